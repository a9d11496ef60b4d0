"""Sequences, views, requests and attention against a daemon."""

import gc

import numpy as np
import pytest
from conftest import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, connect, fill

import kvoyant

GROUP = QUERY_HEADS // KV_HEADS


def dense(queries, keys, values):
    """Attention in numpy: queries [query heads, d] over [tokens, KV heads, d]."""
    out, lse = np.empty_like(queries), np.empty(len(queries), np.float32)
    for head, query in enumerate(queries):
        scores = keys[:, head // GROUP] @ query / np.sqrt(HEAD_DIM)
        lse[head] = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
        out[head] = np.exp(scores - lse[head]) @ values[:, head // GROUP]
    return out, lse


def step(sequence, seed=99):
    """Writes the rows of one more token, and returns its query."""
    random = np.random.default_rng(seed)
    keys, values, query = (random.standard_normal((heads, HEAD_DIM), np.float32) for heads in (KV_HEADS, KV_HEADS, QUERY_HEADS))
    for layer in range(LAYERS):
        sequence.write(layer, keys, values)
    return keys, values, query


@pytest.fixture
def model(daemon):
    with connect(daemon) as model:
        yield model


def test_a_model_says_what_it_is(model, daemon):
    assert (model.layers, model.query_heads, model.kv_heads) == (LAYERS, QUERY_HEADS, KV_HEADS)
    assert (model.key_values, model.value_values, model.row_bytes) == (HEAD_DIM, HEAD_DIM, 2 * HEAD_DIM * 4)
    assert model.mode in ("in-place", "slab") and model.dtype == "f32" and not model.spills
    assert [model.selects(layer) for layer in range(LAYERS)] == [False, True, True]
    assert model.protocol[0] >= 1 and "tests" in repr(model)
    assert model.counters()["rows_appended"] == 0


def test_what_is_written_is_read_and_seen_where_it_lies(model):
    with model.open(300) as sequence:
        keys, values = fill(sequence, 300)
        read_keys, read_values = sequence.read(1)
        np.testing.assert_array_equal(read_keys, keys[1].transpose(1, 0, 2))
        np.testing.assert_array_equal(read_values, values[1].transpose(1, 0, 2))
        runs = sequence.rows(2, 1, 10, 290)
        assert sum(run.count for run in runs) == 280 and runs[0].token == 10
        np.testing.assert_array_equal(np.concatenate([run.keys for run in runs]), keys[2, 10:290, 1])
        np.testing.assert_array_equal(np.concatenate([run.values for run in runs]), values[2, 10:290, 1])
        first = np.asarray(runs[0])
        assert not first.flags.writeable and not first.flags.owndata
        assert first.__array_interface__["data"][0] == runs[0].__array_interface__["data"][0]
        with pytest.raises(ValueError):
            first[0] = 0
        del runs, first


def test_views_go_by_dlpack_without_a_copy(model):
    with model.open(100) as sequence:
        keys, values = fill(sequence, 100)
        run = sequence.rows(0, 0)[0]
        there = np.from_dlpack(run)
        assert there.__array_interface__["data"][0] == run.__array_interface__["data"][0]
        np.testing.assert_array_equal(there[:, :HEAD_DIM], keys[0, : run.count, 0])
        assert run.__dlpack_device__() == (1, 0)
        with pytest.raises(AttributeError, match="host memory"):
            run.__cuda_array_interface__
        with pytest.raises(BufferError, match="where they lie"):
            run.__dlpack__(copy=True)
        del run, there


def test_rows_of_half_floats_and_of_codes(daemon):
    for dtype, kind in (("f16", np.float16), ("int8", np.uint8)):
        with connect(daemon, dtype=dtype, methods=["full"]) as model, model.open(64) as sequence:
            keys, _ = fill(sequence, 64)
            run = sequence.rows(1, 0)[0]
            assert run.numpy().dtype == kind
            read, _ = sequence.read(1)
            np.testing.assert_allclose(read[0], keys[1, :, 0], atol=0.05)
            if dtype == "int8":
                assert run.numpy().shape == (run.count, model.row_bytes)
                with pytest.raises(kvoyant.errors.UnsupportedError, match="codes"):
                    run.keys
            stored = sequence.rows(1, 0)[0].numpy().copy()
            del run
            with model.open(64) as other:
                other.write_rows(1, 0, stored)
                np.testing.assert_array_equal(other.rows(1, 0, 0, 64)[0].numpy(), stored)


def test_an_answer_names_rows_and_they_are_those_that_were_written(model):
    with model.open(400, method=1) as sequence:
        keys, values = fill(sequence, 400)
        _, _, query = step(sequence)
        with model.speculate(1, [sequence], query[None]).wait() as ready:
            assert ready.members == 1 and ready.layer == 1
            said = ready.describe()
            named = ready.tokens(0, 0)
            assert 0 < sum(count for _, count in named) < 400
            assert said["generation"] == 0 and said["boot_id"] > 0
            assert said["rows_selected"] == sum(count for head in range(KV_HEADS) for _, count in ready.tokens(0, head))
            for head in range(KV_HEADS):
                runs = ready.rows(0, head)
                assert [(run.token, run.count) for run in runs] == ready.tokens(0, head)
                assert all(run.in_slab == (model.mode == "slab") for run in runs)
                for run in runs:
                    np.testing.assert_array_equal(run.keys, keys[1, run.token : run.token + run.count, head])
                    np.testing.assert_array_equal(run.values, values[1, run.token : run.token + run.count, head])
                read, _ = ready.read(0, head)
                np.testing.assert_array_equal(read, np.concatenate([run.keys for run in runs]))
                del run, runs
            assert ready.partial(0) is None and ready.rest(0) is None
        assert repr(ready) == "<kvoyant.Ready, released>"


def test_attention_over_everything_is_that_of_numpy(model):
    with model.open(301) as sequence:
        keys, values = fill(sequence, 300)
        key, value, query = step(sequence)
        for layer in range(LAYERS):
            out, lse, *_ = sequence.attend(layer, query)
            wanted = dense(query, np.concatenate([keys[layer], key[None]]), np.concatenate([values[layer], value[None]]))
            np.testing.assert_allclose(out, wanted[0], atol=2e-5)
            np.testing.assert_allclose(lse, wanted[1], atol=2e-5)
        near, _, *_ = sequence.attend(0, query, reach=10)
        wanted, _ = dense(query, np.concatenate([keys[0, -9:], key[None]]), np.concatenate([values[0, -9:], value[None]]))
        np.testing.assert_allclose(near, wanted, atol=2e-5)


def test_attention_over_a_selection_is_that_over_sinks_its_rows_and_the_window(model):
    with model.open(401, method=1) as sequence:
        keys, values = fill(sequence, 400)
        key, value, query = step(sequence)
        attended = sequence.attend(2, query)
        assert attended.missed_mass is None
        keys, values = np.concatenate([keys[2], key[None]]), np.concatenate([values[2], value[None]])
        with model.speculate(2, [sequence], query[None]).wait() as ready:
            for head in range(QUERY_HEADS):
                named = [np.arange(first, first + count) for first, count in ready.tokens(0, head // GROUP)]
                tokens = np.concatenate([np.arange(4), *named, np.arange(401 - 16, 401)])
                wanted, _ = dense(query, keys[tokens], values[tokens])
                np.testing.assert_allclose(attended.out[head], wanted[head], atol=2e-5)


def test_the_error_of_kvoyant_is_below_what_it_certifies(model):
    with model.open(1001, method=2) as sequence:
        keys, values = fill(sequence, 1000)
        key, value, query = step(sequence)
        out, lse, missed, error = sequence.attend(1, query)
        wanted, full = dense(query, np.concatenate([keys[1], key[None]]), np.concatenate([values[1], value[None]]))
        assert missed.shape == error.shape == (QUERY_HEADS,) and np.isfinite(missed).all()
        assert (np.linalg.norm(out - wanted, axis=1) <= error + 1e-5).all()
        assert ((0 <= missed) & (missed <= 1)).all() and np.abs(lse - full).max() < 0.5


def test_a_batch_attends_as_its_members_alone_whatever_their_methods(model):
    sequences = [model.open(500, method=method) for method in range(3)]
    queries = []
    for seed, sequence in enumerate(sequences):
        fill(sequence, 200 + 50 * seed, seed)
        queries.append(step(sequence, seed + 50)[2])
    together = model.attend(1, sequences, np.stack(queries))
    for member, (sequence, query) in enumerate(zip(sequences, queries)):
        alone = sequence.attend(1, query)
        # Thresholds of kvoyant are steered by earlier answers: what two answers select may differ by a little.
        np.testing.assert_allclose(together.out[member], alone.out, atol=1e-5 if sequence.method < 2 else 0.2)
    model.append(sequences)
    assert [sequence.tokens for sequence in sequences] == [201, 251, 301]
    model.close_sequences(sequences)
    assert all(sequence.closed for sequence in sequences)


def test_forks_share_a_past_and_truncated_rows_are_gone(model):
    with model.open(120) as parent:
        fill(parent, 100)
        with parent.fork(method=1) as fork:
            assert (fork.tokens, fork.method, parent.method) == (100, 1, 0)
            fill(parent, 10, seed=1)
            fill(fork, 20, seed=2)
            np.testing.assert_array_equal(parent.read(1, 0, 100)[0], fork.read(1, 0, 100)[0])
            assert not np.array_equal(parent.read(1, 100, 110)[0], fork.read(1, 100, 110)[0])
            fork.truncate(50)
            assert fork.tokens == 50 and parent.tokens == 110
            fill(fork, 5, seed=3)
            assert fork.tokens == 55


def test_a_sequence_comes_back_from_an_image(model):
    sequence = model.open(64)
    keys, _ = fill(sequence, 64)
    name = f"image-{model.session}-{model.mode}"
    sequence.suspend(name, label="a test")
    assert sequence.closed
    with model.resume(name) as again:
        assert again.tokens == 64
        np.testing.assert_array_equal(again.read(2)[0], keys[2].transpose(1, 0, 2))


def test_a_published_prefix_is_attached_to(daemon):
    with connect(daemon, fingerprint="00112233445566778899aabbccddeeff") as model:
        tokens = list(range(100))
        with model.open(100) as sequence:
            keys, _ = fill(sequence, 100)
            published = model.publish(sequence, tokens)
            assert 0 < published <= 100
            with model.attach(tokens + [7]) as other:
                assert 0 < other.tokens <= published
                np.testing.assert_array_equal(other.read(1)[0], keys[1, : other.tokens].transpose(1, 0, 2))


def test_rows_named_by_the_engine_are_answered(daemon):
    with connect(daemon, methods=["given"]) as model, model.open(200) as sequence:
        fill(sequence, 200)
        with model.speculate(1, [sequence], ids=[[[20, 21, 90], [50]]]).wait() as ready:
            assert ready.tokens(0, 0) == [(20, 2), (90, 1)] and ready.tokens(0, 1) == [(50, 1)]
        with pytest.raises(kvoyant.errors.UnsupportedError, match="names"):
            sequence.attend(1, np.zeros((QUERY_HEADS, HEAD_DIM), np.float32), position=199)


def test_a_view_keeps_its_memory_whatever_is_closed(in_place):
    with connect(in_place) as model:
        sequence = model.open(100)
        keys, _ = fill(sequence, 100)
        array = sequence.rows(1, 1)[0].keys
        for what in (sequence.close, lambda: sequence.truncate(5), sequence.fork, lambda: sequence.reserve(500)):
            with pytest.raises(kvoyant.errors.InUseError, match="1 views of the sequence's rows are alive"):
                what()
        fill_count = array.shape[0]
        del sequence
        gc.collect()
        with model.open(100) as other:
            fill(other, 100, seed=8)
        np.testing.assert_array_equal(array, keys[1, :fill_count, 1])
    # The model is closed, and its daemon knows that; the mapping stays.
    del model
    gc.collect()
    np.testing.assert_array_equal(array, keys[1, :fill_count, 1])
