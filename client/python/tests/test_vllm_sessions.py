"""What vLLM's attention backend keeps of the daemon's, driven as vLLM drives it, without vLLM."""

import numpy as np
import pytest
from conftest import Daemon

import kvoyant
from kvoyant._vllm_sessions import Sessions

BLOCK, LAYERS = 32, 2


class Engine:
    """Requests of a scheduler: each has blocks of its own, from a pool that hands out the longest unused first."""

    def __init__(self, daemon, most, heads=4, kv_heads=2, width=32, context=1024):
        self.shape = (heads, kv_heads, width)
        self.shared = Sessions(daemon.socket, "quest:budget=25%,hint=current", LAYERS, heads, kv_heads, width, "f32", most, context)
        self.random = np.random.default_rng(1)
        self.free = list(range(4096))
        self.requests = []

    def admit(self, tokens):
        blocks = [self.free.pop(0) for _ in range(-(-(tokens + 64) // BLOCK))]
        self.requests.append({"blocks": blocks, "tokens": 0})
        self.step({len(self.requests) - 1: tokens})

    def finish(self):
        for request in self.requests:
            self.free += request["blocks"]
        self.requests = []

    def step(self, counts):
        """One step over these requests, with so many new tokens each; which rows of its layers were attended sparsely."""
        heads, kv_heads, width = self.shape
        starts, lengths, tables = [0], [], []
        for at, count in counts.items():
            request = self.requests[at]
            request["tokens"] += count
            starts.append(starts[-1] + count)
            lengths.append(request["tokens"])
            tables.append(request["blocks"])
        draw = lambda n: self.random.standard_normal((starts[-1], n, width), np.float32)  # noqa: E731
        self.shared.begin(starts, lengths, tables, BLOCK)
        sparse = []
        for layer in range(LAYERS):
            try:
                self.shared.write(layer, draw(kv_heads), draw(kv_heads))
                sparse.append(sorted(self.shared.attend(layer, draw(heads))))
            except kvoyant.Error as error:
                self.shared.give_up(error)
                sparse.append([])
        try:
            self.shared.end(BLOCK)
        except kvoyant.Error as error:
            self.shared.give_up(error)
        return sparse

    def decode(self):
        return self.step(dict.fromkeys(range(len(self.requests)), 1))


@pytest.fixture
def small(tmp_path):
    daemon = Daemon(tmp_path, "--in-place", "true", arena="64MiB")
    yield daemon
    daemon.stop()


def test_as_many_requests_as_the_scheduler_has_are_attended_sparsely_at_once(in_place):
    # Their hints and answers are larger than one request to the daemon may be by default.
    engine = Engine(in_place, 130, heads=32, kv_heads=8, width=64, context=8192)
    for _ in range(130):
        engine.admit(100)
    assert engine.decode() == [list(range(130))] * LAYERS
    assert engine.shared.at_once < 130


def test_what_requests_that_have_finished_hold_is_given_to_new_ones(small):
    engine = Engine(small, 4)
    for _ in range(12):
        # Four times 900 tokens take more than a third of the memory, and nobody says that they have finished.
        for _ in range(4):
            engine.admit(900)
        assert engine.decode() == [list(range(4))] * LAYERS
        engine.finish()


def test_a_daemon_that_dies_leaves_dense_attention_and_no_error(tmp_path):
    daemon = Daemon(tmp_path, "--in-place", "true", arena="64MiB")
    engine = Engine(daemon, 4)
    engine.admit(200)
    engine.admit(300)
    assert engine.decode() == [[0, 1]] * LAYERS
    daemon.process.kill()
    daemon.process.wait()
    assert engine.decode() == [[]] * LAYERS
    engine.admit(100)
    assert engine.decode() == [[]] * LAYERS
