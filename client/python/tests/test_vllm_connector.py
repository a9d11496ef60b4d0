"""kvoyant.vllm's connector under vLLM's own scheduler, block allocator and factory; the model is a stand-in that computes a known KV.

Needs vLLM (any build that imports; no GPU): scripts/check-vllm has it.
"""

import hashlib
import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm", reason="vLLM is not installed: scripts/check-vllm installs it")

import json  # noqa: E402

import kvoyant  # noqa: E402
import kvoyant.vllm  # noqa: E402
from kvoyant.vllm import _interface  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

BLOCK, LAYERS, KV_HEADS, HEAD, BLOCKS = 16, 3, 2, 32, 80
# Of these rows, the daemon's smallest pages have two blocks.
PAGE = 32
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "vocab_size": 5000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


# The daemon's, once it runs.
SOCKET = []


@pytest.fixture(scope="module", autouse=True)
def socket(in_place):
    SOCKET[:] = [in_place.socket]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path


def configure(folder, fingerprint, extra=None, role="kv_both", **changed):
    """As `vllm serve` would be told, with the connector by its module path."""
    options = {"socket": SOCKET[0], "fingerprint": fingerprint, **(extra or {})}
    transfer = KVTransferConfig(
        kv_connector="KvoyantConnector",
        kv_connector_module_path="kvoyant.vllm",
        kv_role=role,
        kv_connector_extra_config=options,
        kv_load_failure_policy="recompute",
    )
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), dtype="float16", skip_tokenizer_init=True, max_model_len=2048),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=256,
            max_model_len=2048,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            disable_hybrid_kv_cache_manager=True,
        ),
        cache_config=CacheConfig(block_size=BLOCK, cache_dtype="auto", enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=transfer,
    )
    spec = {"block_size": BLOCK, "num_kv_heads": KV_HEADS, "head_size": HEAD, "dtype": torch.float16, **changed}
    config.cache_config.num_gpu_blocks = BLOCKS
    groups = [KVCacheGroupSpec(NAMES, FullAttentionSpec(**spec))]
    return config, KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


def fresh_fingerprint():
    return os.urandom(16).hex()


def kv_of(tokens, layer):
    """The KV of the last of these tokens in a layer, as a model would have it: of all tokens up to it. `[KV heads, 2 * head]`."""
    seed = int.from_bytes(hashlib.sha256(repr((tokens, layer)).encode()).digest()[:7], "big")
    return torch.randn(KV_HEADS, 2 * HEAD, generator=torch.Generator().manual_seed(seed)).half()


def next_of(tokens):
    return 3 + int.from_bytes(hashlib.sha256(repr(tokens).encode()).digest()[:4], "big") % 4000


class Engine:
    """vLLM's scheduler with the connector's two roles, and a worker that does to the cache what a model would, in the order that vLLM's has."""

    def __init__(self, folder, fingerprint, extra=None, role="kv_both"):
        init_none_hash(sha256)
        config, caches = configure(folder, fingerprint, extra, role)
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=caches,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, caches)
        self.caches = {name: torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD, dtype=torch.float16) for name in NAMES}
        self.worker.register_kv_caches(self.caches)
        self.requests, self.blocks, self.outputs = {}, {}, {}
        self.computed = self.loaded = self.failed = 0

    def add(self, name, tokens, most=4, **more):
        sampling = SamplingParams(max_tokens=most, ignore_eos=True)
        hasher = get_request_block_hasher(BLOCK, sha256)
        request = Request(request_id=name, prompt_token_ids=tokens, sampling_params=sampling, pooling_params=None, block_hasher=hasher, **more)
        self.requests[name] = request
        self.scheduler.add_request(request)

    def step(self):
        step = self.scheduler.schedule()
        meta = step.kv_connector_metadata
        self.loaded += sum(load.end - load.first for load in meta.loads)
        self.worker.bind_connector_metadata(meta)
        if step.has_sync_kv_loads:
            self.worker.start_load_kv(None)
        for new in step.scheduled_new_reqs:
            self.blocks[new.req_id] = list(new.block_ids[0])
        cached = step.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                self.blocks[name] = list(blocks[0])
            elif blocks:
                self.blocks[name] += blocks[0]
        starts = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs} | dict(zip(cached.req_ids, cached.num_computed_tokens))
        wrong = self.worker._failed.copy()
        sampled = {}
        for name, count in step.num_scheduled_tokens.items():
            tokens, start = list(self.requests[name].all_token_ids), starts[name]
            if not wrong.intersection(self.blocks[name]):
                self.check(name, tokens, start)
            for at in range(start, start + count):
                for layer, cache in enumerate(self.caches.values()):
                    # What was computed from blocks that did not load is no KV of these tokens.
                    known = [-1, *tokens[: at + 1]] if wrong.intersection(self.blocks[name]) else tokens[: at + 1]
                    cache[self.blocks[name][at // BLOCK], :, at % BLOCK] = kv_of(known, layer)
            self.computed += count
            sampled[name] = [next_of(tokens)] if start + count == len(tokens) else []
        if not step.has_sync_kv_loads:
            self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        results = self.worker.get_transfer_results(step.finished_req_ids)
        invalid = self.worker.get_block_ids_with_load_errors()
        self.failed += len(invalid)
        self.worker.clear_connector_metadata()
        names = list(step.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
            kv_connector_output=KVConnectorOutput(
                finished_sending=results.finished_sending, finished_recving=results.finished_recving, invalid_block_ids=invalid
            ),
        )
        for outputs in self.scheduler.update_from_output(step, output).values():
            for out in outputs.outputs:
                self.outputs.setdefault(out.request_id, []).extend(out.new_token_ids)

    def check(self, name, tokens, end):
        """What attention would read: the KV of every earlier token is the one that the model computes."""
        for at in range(end):
            for layer, cache in enumerate(self.caches.values()):
                found = cache[self.blocks[name][at // BLOCK], :, at % BLOCK]
                assert torch.equal(found, kv_of(tokens[: at + 1], layer)), f"{name}: token {at} of layer {layer}"

    def run(self):
        for _ in range(200):
            if not self.scheduler.has_unfinished_requests():
                # vLLM says in the next step who has finished.
                self.step()
                return self
            self.step()
        raise AssertionError("the requests do not end")

    def close(self):
        self.worker.shutdown()
        self.scheduler.connector.shutdown()


@pytest.fixture
def engine(folder):
    made = []

    def make(fingerprint, **more):
        made.append(Engine(folder, fingerprint, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def prompt(seed, count):
    return [int(token) for token in torch.randint(3, 4000, (count,), generator=torch.Generator().manual_seed(seed))]


def expected(tokens, most=4):
    tokens = list(tokens)
    for _ in range(most):
        tokens.append(next_of(tokens))
    return tokens[-most:]


def test_a_second_instance_begins_with_what_the_first_has_published(engine):
    fingerprint, tokens = fresh_fingerprint(), prompt(1, 300)
    first = engine(fingerprint)
    first.add("a", tokens)
    first.run()
    assert (first.loaded, first.outputs["a"]) == (0, expected(tokens))
    second = engine(fingerprint)
    second.add("b", tokens)
    second.add("c", tokens[:200] + prompt(2, 50))
    second.run()
    assert second.outputs["b"] == expected(tokens)
    assert second.outputs["c"] == expected(tokens[:200] + prompt(2, 50))
    # 288 of 300 and 192 of 200: whole pages, of which c finds some in vLLM's own cache if b came first.
    assert 288 <= second.loaded <= 288 + 192
    assert second.computed < first.computed


def test_answers_are_published_too_as_their_blocks_fill(engine):
    fingerprint, tokens = fresh_fingerprint(), prompt(3, 60)
    first = engine(fingerprint)
    first.add("a", tokens, most=100)
    first.run()
    whole = tokens + expected(tokens, 100)
    second = engine(fingerprint)
    second.add("b", whole + prompt(4, 10))
    second.run()
    # 159 tokens have KV, the last one was never computed.
    assert second.loaded == 159 // PAGE * PAGE


def test_another_model_or_an_unsharable_request_finds_nothing(engine):
    fingerprint, tokens = fresh_fingerprint(), prompt(5, 100)
    first = engine(fingerprint)
    first.add("a", tokens)
    first.run()
    other = engine(fresh_fingerprint())
    other.add("b", tokens)
    other.run()
    salted = engine(fingerprint)
    salted.add("c", tokens, cache_salt="tenant")
    salted.run()
    assert other.loaded == salted.loaded == 0
    assert other.outputs["b"] == salted.outputs["c"] == expected(tokens)


def test_a_prefix_that_went_away_is_computed_again_and_its_garbage_published_to_nobody(engine, monkeypatch):
    fingerprint, tokens = fresh_fingerprint(), prompt(6, 200)
    first = engine(fingerprint)
    first.add("a", tokens)
    first.run()
    second = engine(fingerprint)

    class Gone:
        """The worker's session, to which nothing is published any more."""

        def __init__(self, model):
            self.model = model

        def attach(self, tokens, **more):
            raise kvoyant.errors.NotReadyError("nothing is published any more")

        def __getattr__(self, name):
            return getattr(self.model, name)

    monkeypatch.setattr(second.worker, "_model", Gone(second.worker._model))
    longer = tokens + prompt(7, 100)
    second.add("b", longer)
    second.run()
    assert second.failed == 192 // BLOCK and second.outputs["b"] == expected(longer)
    third = engine(fingerprint)
    third.add("c", longer)
    third.run()
    # What `b` computed was not published; what `a` did is sound (every step checks what it reads).
    assert third.loaded == 192 and third.outputs["c"] == expected(longer)


def test_preempted_requests_come_back_with_their_tokens(engine):
    fingerprint = fresh_fingerprint()
    one = engine(fingerprint)
    # 79 blocks for three requests that want 29 each in the end: one is preempted, and loads what it has published.
    prompts = [prompt(seed, 400) for seed in (8, 9, 10)]
    for i, tokens in enumerate(prompts):
        one.add(f"p{i}", tokens, most=60)
    one.run()
    for i, tokens in enumerate(prompts):
        assert one.outputs[f"p{i}"] == expected(tokens, 60), i
    assert sum(request.num_preemptions for request in one.requests.values()) > 0
    assert one.loaded > 0


def test_an_aborted_request_leaves_nothing_held(engine):
    fingerprint, tokens = fresh_fingerprint(), prompt(11, 100)
    first = engine(fingerprint)
    first.add("a", tokens)
    first.run()
    second = engine(fingerprint)
    second.add("b", tokens, most=50)
    second.step()
    second.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    second.step()
    assert second.scheduler.connector._requests == {} and second.worker._sequences == {}


def test_a_reader_publishes_nothing_and_a_writer_loads_nothing(engine):
    fingerprint, tokens = fresh_fingerprint(), prompt(12, 100)
    reader = engine(fingerprint, role="kv_consumer")
    reader.add("a", tokens)
    reader.run()
    writer = engine(fingerprint, role="kv_producer")
    writer.add("b", tokens)
    writer.run()
    again = engine(fingerprint, role="kv_consumer")
    again.add("c", tokens)
    again.run()
    assert (reader.loaded, writer.loaded, again.loaded) == (0, 0, 96)


def test_a_lookup_has_no_effect_however_often(engine):
    fingerprint, tokens = fresh_fingerprint(), prompt(13, 100)
    first = engine(fingerprint)
    first.add("a", tokens)
    first.run()
    second = engine(fingerprint)
    request = Request(request_id="b", prompt_token_ids=tokens, sampling_params=SamplingParams(max_tokens=1), pooling_params=None)
    connector = second.scheduler.connector
    assert [connector.get_num_new_matched_tokens(request, 0) for _ in range(3)] == [(96, False)] * 3
    assert connector.get_num_new_matched_tokens(request, 64) == (32, False)
    assert connector.get_num_new_matched_tokens(request, 96) == (0, False)
    assert connector._requests["b"].held is None


def test_wrong_configurations_are_refused_with_a_sentence(folder):
    fingerprint = fresh_fingerprint()

    def create(config, caches):
        return KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, caches)

    with pytest.raises(ValueError, match="has sockt; kvoyant knows socket"):
        create(*configure(folder, fingerprint, {"sockt": "/x"}))
    with pytest.raises(kvoyant.Error, match="/nowhere"):
        create(*configure(folder, fingerprint, {"socket": "/nowhere/kvoyantd.sock"}))
    with pytest.raises(ValueError, match="set kv_cache_dtype to auto"):
        create(*configure(folder, fingerprint, dtype=torch.uint8))
    config, caches = configure(folder, fingerprint)
    config.parallel_config.tensor_parallel_size = 2
    with pytest.raises(ValueError, match="tensor_parallel_size is 2"):
        create(config, caches)
    connector = create(*configure(folder, fingerprint))
    try:
        with pytest.raises(ValueError, match="for 3 layers"):
            connector.register_kv_caches({NAMES[0]: torch.zeros(1)})
        with pytest.raises(ValueError, match="the KV cache of model.layers.0"):
            connector.register_kv_caches({name: torch.zeros(BLOCKS, BLOCK, KV_HEADS, 2 * HEAD, dtype=torch.float16) for name in NAMES})
        with pytest.raises(ValueError, match="the KV cache of model.layers.0"):
            connector.register_kv_caches({name: torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD) for name in NAMES})
    finally:
        connector.shutdown()


def test_the_recorded_interface_is_that_of_the_installed_vllm():
    assert list(_interface.differences(KVConnectorBase_V1)) == []
    assert not kvoyant.vllm.KvoyantConnector.__abstractmethods__


def test_another_interface_is_an_import_error_that_names_it(monkeypatch):
    monkeypatch.setattr(KVConnectorBase_V1, "get_num_new_matched_tokens", lambda self, request, tokens, more: None)
    with pytest.raises(ImportError, match=r"get_num_new_matched_tokens takes \(request, tokens, more\)"):
        _interface.check()
