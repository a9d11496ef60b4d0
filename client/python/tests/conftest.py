"""A real daemon for the tests, from KVOYANT_DAEMON or the workspace's target folder."""

import os
import pathlib
import subprocess
import time

import numpy as np
import pytest

import kvoyant

ROOT = pathlib.Path(__file__).resolve().parents[3]
PATIENCE = 30.0


def daemon_program() -> str:
    named = os.environ.get("KVOYANT_DAEMON")
    if named:
        return named
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    for profile in ("release", "debug"):
        program = target / profile / "kvoyantd"
        if program.exists():
            return str(program)
    pytest.exit(f"there is no kvoyantd in {target}: cargo build -p kvoyant-daemon makes one, or set KVOYANT_DAEMON", 2)


class Daemon:
    """A running daemon on sockets in a folder."""

    def __init__(self, folder: pathlib.Path, *flags: str, arena: str = "512MiB"):
        self.socket = str(folder / "kvoyantd.sock")
        self.log = folder / "log"
        (folder / "store").mkdir()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [daemon_program(), "--config", "/dev/null", "--socket", self.socket, "--admin-socket", str(folder / "admin.sock"),
                 "--arena", arena, "--pin", "false", "--newcomers-percent", "0", "--store", str(folder / "store"), *flags],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )
        since = time.monotonic()
        while not os.path.exists(self.socket):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - since < PATIENCE, "the daemon made no socket"
            time.sleep(0.01)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture(scope="session", params=["in-place", "slab"])
def daemon(request, tmp_path_factory):
    flags = ["--in-place", "true"] if request.param == "in-place" else []
    daemon = Daemon(tmp_path_factory.mktemp(request.param), *flags)
    yield daemon
    daemon.stop()


@pytest.fixture(scope="session")
def in_place(tmp_path_factory):
    daemon = Daemon(tmp_path_factory.mktemp("alone"), "--in-place", "true")
    yield daemon
    daemon.stop()


LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 32


def connect(daemon: Daemon, **spec) -> kvoyant.Model:
    """A model of three layers, of which the first is dense."""
    known = dict(
        layers=LAYERS, query_heads=QUERY_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="f32", sinks=4, window=16, dense_layers=1,
        methods=["full", "quest:budget=25%", "kvoyant:budget=10%"], name="tests",
    )
    known.update(spec)
    return kvoyant.connect(daemon.socket, **known)


def fill(sequence: kvoyant.Sequence, tokens: int, seed: int = 0, layers: int = LAYERS):
    """Writes and appends random rows; returns keys and values, [layers, tokens, KV heads, d]."""
    random = np.random.default_rng(seed)
    shape = (layers, tokens, KV_HEADS, HEAD_DIM)
    keys, values = random.standard_normal(shape, np.float32), random.standard_normal(shape, np.float32)
    first = sequence.tokens
    sequence.reserve(first + tokens)
    for layer in range(layers):
        sequence.write(layer, keys[layer], values[layer])
    sequence.append(tokens)
    assert sequence.tokens == first + tokens
    return keys, values
