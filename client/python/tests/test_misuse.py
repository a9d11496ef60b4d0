"""Wrong use is an error that names the mistake, and never a crash."""

import os
import signal
import threading

import numpy as np
import pytest
from conftest import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, Daemon, connect, fill

import kvoyant
from kvoyant import errors


def rows(tokens=1, heads=KV_HEADS, width=HEAD_DIM, dtype=np.float32):
    return np.zeros((tokens, heads, width), dtype)


@pytest.fixture(scope="module")
def model(in_place):
    with connect(in_place) as model:
        yield model


@pytest.fixture
def sequence(model):
    with model.open(300) as sequence:
        fill(sequence, 200)
        yield sequence


def says(kind, words):
    return pytest.raises(kind, match=words or None)


def test_errors_are_a_family():
    for name, kind in vars(errors).items():
        if isinstance(kind, type):
            assert issubclass(kind, kvoyant.Error) and kind.__doc__, name
    assert issubclass(errors.ShapeError, ValueError) and issubclass(errors.DtypeError, TypeError)
    assert issubclass(errors.DeadlineError, TimeoutError) and issubclass(errors.ConnectError, ConnectionError)


def test_what_is_closed_says_so(model):
    sequence = model.open(10)
    sequence.close()
    sequence.close()
    for call in (lambda: sequence.tokens, sequence.append, lambda: sequence.write(0, rows(), rows()), lambda: sequence.rows(0, 0)):
        with says(errors.ClosedError, "the sequence was closed or released before"):
            call()
    assert sequence.closed and repr(sequence) == "<kvoyant.Sequence, closed>"


def test_what_a_daemon_would_take_for_an_attack_is_the_callers_mistake_and_nothing_has_happened(model, sequence):
    query = np.ones((1, QUERY_HEADS, HEAD_DIM), np.float32)
    by_query = sequence.fork(method=1)
    sequence.reserve(300)
    for call in (
        lambda: model.speculate(0, [sequence], query, positions=[199]),
        lambda: model.speculate(1, [sequence, by_query], positions=[199, 199]),
        lambda: sequence.feedback(1, 200, np.zeros((KV_HEADS, 200), np.float32)),
    ):
        with says(errors.ArgumentError, "attended whole|selects by|learns from no"):
            call()
    with says(errors.ShapeError, "a mark has 200"):
        sequence.mark(200, bytes([200]))
    model.speculate(1, [sequence], query, positions=[199]).wait().release()


def test_an_answer_and_a_request_are_over_once(model, sequence):
    query = np.ones((1, QUERY_HEADS, HEAD_DIM), np.float32)
    pending = model.speculate(1, [sequence], query, positions=[199])
    ready = pending.wait()
    with says(errors.ClosedError, "the request was closed"):
        pending.wait()
    ready.release()
    ready.release()
    for call in (lambda: ready.rows(0, 0), lambda: ready.members, ready.describe):
        with says(errors.ClosedError, "the answer was closed"):
            call()


def test_what_belongs_to_a_closed_model_is_closed(in_place):
    model = connect(in_place)
    sequence = model.open(10)
    model.close()
    model.close()
    assert model.closed and sequence.closed
    with says(errors.ClosedError, "the model was closed"):
        model.open(5)
    with says(errors.ClosedError, "by itself or with its model"):
        sequence.append()


@pytest.mark.parametrize(
    "keys, values, kind, words",
    [
        (rows(width=31), rows(), errors.ShapeError, r"keys: the shape is \[1, 2, 31\], where \[1, 2, 32\] is needed \(tokens, KV heads"),
        (rows(), rows(tokens=2), errors.ShapeError, r"values: the shape is \[2, 2, 32\], where \[1, 2, 32\]"),
        (np.zeros(64, np.float32), rows(), errors.ShapeError, r"keys: the shape is \[64\], where \[2, 32\]"),
        (rows(dtype=np.float64), rows(), errors.DtypeError, "keys: the dtype is float64, where float32 or float16"),
        (rows(), rows(dtype=np.int32), errors.DtypeError, "values: the dtype is int32"),
        (rows(dtype=np.uint8), rows(), errors.DtypeError, "keys: the dtype is uint8"),
        (rows(width=64)[..., ::2], rows(), errors.ArgumentError, "keys: the array is not contiguous"),
        (rows(tokens=2, heads=HEAD_DIM, width=KV_HEADS).transpose(0, 2, 1), rows(2), errors.ArgumentError, "keys: the array is not contiguous"),
        ([[1.0]], rows(), errors.ArgumentError, "keys: a list is no array"),
        (rows(), None, errors.ArgumentError, "values: there is no array, where one is needed"),
    ],
)
def test_arrays_of_another_shape_type_or_layout_are_refused(sequence, keys, values, kind, words):
    with says(kind, words):
        sequence.write(0, keys, values)


def test_arrays_that_are_not_aligned_are_refused(sequence):
    askew = np.frombuffer(bytearray(KV_HEADS * HEAD_DIM * 4 + 1), np.uint8)[1:].view(np.float32).reshape(KV_HEADS, HEAD_DIM)
    with says(errors.ArgumentError, "not aligned to 4 bytes"):
        sequence.write(0, askew, askew)


def test_indices_and_positions_that_are_not_there_are_refused(model, sequence):
    for call, kind, words in [
        (lambda: sequence.write(LAYERS, rows(), rows()), errors.ArgumentError, "layer 3 of a model of 3"),
        (lambda: sequence.rows(0, KV_HEADS), errors.ArgumentError, "KV head 2 of a model of 2"),
        (lambda: model.open(5, method=9), errors.ArgumentError, "method 9 of a model that registered 3"),
        (lambda: sequence.write(0, rows(), rows(), position=100_000), errors.NoRoomError, "beyond the"),
        (lambda: sequence.append(100_000), errors.NoRoomError, "reserve more"),
        (lambda: sequence.write(0, rows(), rows(), position=3), errors.NoRoomError, ""),
        (lambda: sequence.read(0, 9, 3), errors.ArgumentError, "9..3"),
        (lambda: sequence.read(0, 0, 100_000), errors.NoRoomError, ""),
        (lambda: sequence.attend(1, np.zeros((4, 32), np.float32), position=5000), errors.NoRoomError, "position 5000"),
        (lambda: sequence.attend(1, np.zeros((4, 32), np.float32), reach=0), errors.ArgumentError, "reach is 0"),
        (lambda: sequence.attend(1, np.zeros((4, 32), np.float32), timeout=-1.0), errors.ArgumentError, "a time of -1"),
        (lambda: sequence.attend(1, np.zeros((2, 32), np.float32)), errors.ShapeError, r"query: the shape is \[2, 32\], where \[4, 32\]"),
        (lambda: sequence.write(-1, rows(), rows()), OverflowError, ""),
    ]:
        with says(kind, words):
            call()


def test_requests_that_do_not_fit_are_refused(in_place, model, sequence):
    query = np.zeros((1, QUERY_HEADS, HEAD_DIM), np.float32)
    with connect(in_place) as other:
        stranger = other.open(5)
        for call, kind, words in [
            (lambda: model.speculate(1, [stranger], query), errors.ArgumentError, "sequence 0 of the call belongs to another model"),
            (lambda: model.append([sequence, sequence]), errors.ArgumentError, "sequence 1 of the call came before"),
            (lambda: model.append([sequence], [1, 2]), errors.ShapeError, "tokens: there are 2, where 1 sequences"),
            (lambda: model.speculate(1, [sequence], query[0]), errors.ShapeError, r"queries: the shape is \[4, 32\]"),
            (lambda: model.speculate(1, [sequence], floors=np.zeros((1, QUERY_HEADS), np.float32)), errors.ArgumentError, "floors come without queries"),
            (lambda: model.speculate(1, [sequence], query, ids=[[[1], []]]), errors.ArgumentError, "by one or the other"),
            (lambda: model.speculate(1, [sequence], ids=[[[1]]]), errors.ShapeError, "ids: there are lists of 1 KV heads"),
            (lambda: model.speculate(1, [sequence], query, positions=[1, 2]), errors.ShapeError, "positions: there are 2"),
            (lambda: model.speculate(1, ["a sequence"], query), TypeError, ""),
        ]:
            with says(kind, words):
                call()


def test_nobody_there_and_models_that_do_not_fit(in_place, tmp_path):
    with says(errors.ConnectError, "is kvoyantd running"):
        kvoyant.connect(tmp_path / "nobody", layers=1, query_heads=1, kv_heads=1, head_dim=32)
    with says(kvoyant.Error, "clairvoyance"):
        connect(in_place, methods=["clairvoyance"])
    with says(errors.DtypeError, "f17"):
        connect(in_place, dtype="f17")
    with says(errors.ArgumentError, "ring_slots"):
        connect(in_place, ring_slots=3)
    with says(TypeError, "layers"):
        kvoyant.connect(in_place.socket)


def test_as_many_answers_as_slots(in_place):
    with connect(in_place, ring_slots=2, ticket_timeout=0.05) as model, model.open(100) as sequence:
        fill(sequence, 99)
        query = np.zeros((1, QUERY_HEADS, HEAD_DIM), np.float32)
        held = [model.speculate(1, [sequence], query).wait() for _ in range(2)]
        with says(errors.BusyError, "ring_slots; drop some"):
            model.speculate(1, [sequence], query)
        views = held[0].rows(0, 0)
        held[0].release()
        with says(errors.BusyError, ""):
            # Its slot is held by the views.
            model.speculate(1, [sequence], query)
        del views
        model.speculate(1, [sequence], query).wait().release()
        held[1].release()


def test_who_waits_for_a_slot_lets_those_go_on_that_release_it(in_place):
    with connect(in_place, ring_slots=2, ticket_timeout=20.0) as model, model.open(100) as sequence:
        fill(sequence, 99)
        query = np.zeros((1, QUERY_HEADS, HEAD_DIM), np.float32)
        held = [model.speculate(1, [sequence], query).wait() for _ in range(2)]
        threads = [threading.Timer(0.1, ready.release) for ready in held]
        for thread in threads:
            thread.start()
        model.speculate(1, [sequence], query).wait().release()
        for thread in threads:
            thread.join()


def test_other_threads_run_while_one_waits_and_are_told_if_they_meet_at_its_sequence(tmp_path):
    daemon = Daemon(tmp_path, "--in-place", "true")
    try:
        with connect(daemon, methods=["quest:budget=25%"], control_timeout=20.0) as model:
            sequence = model.open(100)
            fill(sequence, 90)
            query = np.zeros((QUERY_HEADS, HEAD_DIM), np.float32)
            daemon.process.send_signal(signal.SIGSTOP)
            ended = []
            thread = threading.Thread(target=lambda: ended.append(sequence.attend(1, query)))
            thread.start()
            # The other thread waits for a daemon that is stopped, inside a call on the sequence.
            met = None
            while thread.is_alive() and met is None:
                try:
                    # More than there is room for: without another thread inside, nothing happens.
                    sequence.append(1_000_000)
                except errors.NoRoomError:
                    pass
                except errors.ConcurrentError as error:
                    met = str(error)
            daemon.process.send_signal(signal.SIGCONT)
            thread.join()
            assert "the sequence is being used by another thread" in met and len(ended) == 1
            sequence.append(1)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
        daemon.stop()


def test_a_daemon_that_dies_is_an_error_in_every_call_and_rows_stay(tmp_path):
    daemon = Daemon(tmp_path, "--in-place", "true")
    with connect(daemon) as model:
        sequence = model.open(100)
        keys, _ = fill(sequence, 90)
        view = sequence.rows(1, 0)[0].keys
        daemon.process.kill()
        daemon.process.wait()
        query = np.zeros((QUERY_HEADS, HEAD_DIM), np.float32)
        for call in (lambda: sequence.attend(1, query), lambda: model.open(5)):
            with says(errors.GoneError, "the daemon has gone"):
                call()
        np.testing.assert_array_equal(view, keys[1, : len(view), 0])
        # What needs no daemon still works.
        out, *_ = sequence.attend(0, query)
        assert np.isfinite(out).all()
        del view


def in_child(check) -> None:
    """Runs `check` in a forked child, which must end well by itself."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException:  # noqa: BLE001 - a child says it by its exit status
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_child_has_no_session_and_its_parent_goes_on_undisturbed(in_place):
    import gc

    model = connect(in_place)
    sequence = model.open(200)
    fill(sequence, 150)
    query = np.zeros((1, QUERY_HEADS, HEAD_DIM), np.float32)
    ready = model.speculate(1, [sequence], query).wait()
    pending = model.speculate(2, [sequence], query)
    sequence.attend(0, query[0])

    def check():
        nonlocal model, sequence, ready, pending
        for call in (model.counters, sequence.append, ready.describe, pending.wait, sequence.close, model.close, ready.release):
            with pytest.raises(errors.ForkedError, match="belongs to the parent of this process"):
                call()
        # Nothing of the parent's is closed by a child that lets go of it.
        del ready, pending, sequence, model
        gc.collect()
        with connect(in_place) as mine, mine.open(200) as own:
            fill(own, 150)
            out, *_ = own.attend(1, query[0], position=149)
            assert np.isfinite(out).all()

    in_child(check)
    assert ready.describe()["rows_selected"] > 0
    pending.wait().release()
    ready.release()
    fill(sequence, 10)
    out, *_ = sequence.attend(1, query[0], position=159)
    assert np.isfinite(out).all()
    model.close()
