"""The decoder of tests/c, in Python: tokens depend on every bit of every row that attention reads."""

import os
import subprocess

import numpy as np
import pytest
from conftest import connect

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 32
SINKS, WINDOW, PROMPT, STEPS, ROOM = 4, 16, 300, 24, 512
WORD = 0xFFFFFFFF


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 2246822519 & WORD
    x ^= x >> 13
    x = x * 3266489917 & WORD
    return x ^ (x >> 16)


def values(heads: int, token: int, layer: int, kind: int) -> np.ndarray:
    """Keys (0), values (1) or queries (2) of a token in a layer."""
    base = token * 8191 + layer * 131 + kind * 17
    count = heads * HEAD_DIM
    bits = [mix((base + mix(at)) & WORD) & 0xFFFF for at in range(count)]
    return ((np.array(bits, np.int32) - 32768).astype(np.float32) / np.float32(32768)).reshape(heads, HEAD_DIM)


def prompt_token(seed: int, at: int) -> int:
    return mix((seed * 7919 + at) & WORD) % 32000


def attend(query: np.ndarray, rows: list) -> np.ndarray:
    """One query head's output: every sum in the order of the rows, in float32."""
    rows = np.concatenate(rows)
    keys, held = rows[:, :HEAD_DIM], rows[:, HEAD_DIM:]
    scores = np.zeros(len(rows), np.float32)
    for j in range(HEAD_DIM):
        scores += query[j] * keys[:, j]
    weights = np.float32(0.01) + scores * scores
    total = np.add.accumulate(weights, dtype=np.float32)[-1]
    return np.add.accumulate(weights[:, None] * held, axis=0, dtype=np.float32)[-1] / total


def decode(model, seed: int) -> list:
    tokens = []
    with model.open(ROOM) as sequence:
        prompt = [prompt_token(seed, at) for at in range(PROMPT)]
        for layer in range(LAYERS):
            keys, held = (np.stack([values(KV_HEADS, token, layer, kind) for token in prompt]) for kind in (0, 1))
            sequence.write(layer, keys, held)
        sequence.append(PROMPT)
        token = prompt_token(seed, PROMPT)
        for position in range(PROMPT, PROMPT + STEPS):
            hashed = 2166136261
            for layer in range(LAYERS):
                queries = values(QUERY_HEADS, token, layer, 2)
                sequence.write(layer, values(KV_HEADS, token, layer, 0), values(KV_HEADS, token, layer, 1))
                ready = None if layer == 0 else model.speculate(layer, [sequence], queries[None]).wait()
                for head in range(QUERY_HEADS):
                    kv_head = head // (QUERY_HEADS // KV_HEADS)
                    if ready is None:
                        runs = sequence.rows(layer, kv_head, 0, position + 1)
                    else:
                        runs = sequence.rows(layer, kv_head, 0, SINKS) + ready.rows(0, kv_head)
                        runs += sequence.rows(layer, kv_head, position + 1 - WINDOW, position + 1)
                    for bits in attend(queries[head], [run.numpy() for run in runs]).view(np.uint32).tolist():
                        hashed = (hashed ^ bits) * 16777619 & WORD
                    del runs
                if ready is not None:
                    ready.release()
            sequence.append()
            token = hashed % 32000
            tokens.append(token)
    return tokens


def test_python_gives_the_tokens_of_the_c_program_which_are_those_of_the_rust_client(daemon):
    program = os.environ.get("KVOYANT_C_DECODE")
    if not program:
        pytest.skip("KVOYANT_C_DECODE names no program: scripts/check-python compiles tests/c/decode.c")
    fingerprint = "0123456789abcdef0123456789abcdef"
    with connect(daemon, methods=["quest:budget=25%", "full"], fingerprint=fingerprint, window=WINDOW, name="toy") as model:
        mine = "".join(" ".join(map(str, decode(model, seed))) + "\n" for seed in (0, 1))
    theirs = subprocess.run([program, daemon.socket], capture_output=True, text=True, check=True).stdout
    assert mine == theirs
    assert len(set(mine.split())) > STEPS
