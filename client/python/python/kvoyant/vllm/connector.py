"""The KV connector: blocks of KV go to the daemon when they are full, and come back for whoever begins with the same tokens.

Each role of a connector has a session of its own with the daemon. The scheduler's looks prefixes up and holds them, so that what it has
counted is there when a worker loads it; the worker's copies blocks. Loading and saving are synchronous and by whole steps, so no hook
inside a layer is used, and CUDA graphs may be full ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import kvoyant
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.kvoyant")

SOCKET = "/run/kvoyant/kvoyantd.sock"
OPTIONS = ("socket", "fingerprint", "shared", "save", "name")
# Pages of the daemon's are whole ones of the machine's memory.
MEMORY_PAGE = 4096
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class Load:
    """Tokens of a request that come from the daemon: `first..end`, whole blocks, of the prefix `tokens[:end]`."""

    request: str
    tokens: list[int]
    first: int
    end: int
    blocks: list[int]


@dataclass
class Save:
    """Tokens of a request whose KV is there after this step, from 0 to len(tokens), whole blocks."""

    request: str
    tokens: list[int]
    blocks: list[int]


@dataclass
class KvoyantMetadata(KVConnectorMetadata):
    """What a step loads and saves."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class _Scheduled:
    """A request, as the scheduler's side knows it."""

    request: Request
    blocks: list[int] = field(default_factory=list)
    # A sequence that begins with a published prefix: it keeps that there.
    held: Any = None
    # Tokens to load in the step that is being put together.
    loading: int = 0
    # Tokens that the daemon has, or will have when the worker is done with what it was told.
    saved: int = 0

    def let_go(self):
        held, self.held = self.held, None
        if held is not None:
            _close(held)


@dataclass
class _Shape:
    """What of a model's KV cache the daemon must know."""

    layers: int
    query_heads: int
    kv_heads: int
    half: int
    block: int
    # Tokens of the daemon's pages: whole blocks, and as few of them as fill whole pages of memory. Prefixes are shared by these.
    page: int
    dtype: torch.dtype


def _close(sequence):
    try:
        sequence.close()
    except kvoyant.Error as error:
        logger.debug("closing a sequence: %s", error)


def _layer_number(name: str) -> tuple[int, str]:
    numbers = re.findall(r"\d+", name)
    return (int(numbers[0]) if numbers else 0, name)


def _sharable(request: Request) -> bool:
    """Whether a request's KV depends on its tokens alone, and may be found by them."""
    return not (
        request.lora_request
        or request.mm_features
        or getattr(request, "prompt_embeds", None) is not None
        or getattr(request, "cache_salt", None)
        or not request.prompt_token_ids
    )


class KvoyantConnector(KVConnectorBase_V1):
    """vLLM's KV connector for Kvoyant. Options, in `kv_connector_extra_config`:

    | option | default | |
    |---|---|---|
    | `socket` | `/run/kvoyant/kvoyantd.sock` | the daemon's |
    | `fingerprint` | of the model's name, revision and configuration | 32 hexadecimal digits; set it where weights change and these do not |
    | `shared` | `false` | whether other users' processes may begin with what this one publishes |
    | `save` | `true` | whether anything is published; else only what others did is loaded |
    | `name` | `vllm` | in `kvoyant status` |
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config or {}
        unknown = sorted(set(extra) - set(OPTIONS))
        if unknown:
            raise ValueError(f"kv_connector_extra_config has {', '.join(unknown)}; kvoyant knows {', '.join(OPTIONS)}")
        self._shared = bool(extra.get("shared", False))
        self._saves = bool(extra.get("save", True)) and self._kv_transfer_config.is_kv_producer
        self._loads = self._kv_transfer_config.is_kv_consumer
        self._shape = _shape(vllm_config, kv_cache_config)
        self._model = kvoyant.connect(
            extra.get("socket", SOCKET),
            name=extra.get("name", "vllm"),
            fingerprint=extra.get("fingerprint") or _fingerprint(vllm_config),
            rope=_layout(vllm_config, self._shape),
            layers=self._shape.layers,
            query_heads=self._shape.query_heads,
            kv_heads=self._shape.kv_heads,
            head_dim=self._shape.half,
            dtype=DTYPES[self._shape.dtype],
            page_rows=self._shape.page,
            methods=["full"],
        )
        # The scheduler's side.
        self._requests: dict[str, _Scheduled] = {}
        # The worker's side.
        self._caches: list[torch.Tensor] = []
        self._sequences: dict[str, Any] = {}
        self._unsaved: set[str] = set()
        self._failed: set[int] = set()

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens behind those computed here the daemon has. They are held until the request has loaded them, or will not."""
        if not self._loads or not _sharable(request):
            return 0, False
        known = self._requests.setdefault(request.request_id, _Scheduled(request))
        if known.held is None:
            try:
                known.held = self._model.attach(list(request.all_token_ids))
            except kvoyant.Error as error:
                logger.warning("no prefixes from Kvoyant: %s", error)
                return 0, False
        # At least one token is computed, so that there are logits.
        most = min(known.held.tokens, request.num_tokens - 1)
        matched = most // self._shape.page * self._shape.page
        if matched <= num_computed_tokens:
            known.let_go()
            return 0, False
        return matched - num_computed_tokens, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int):
        """A request has its blocks; what was looked up for it is loaded, or let go."""
        if not _sharable(request):
            return
        known = self._requests.setdefault(request.request_id, _Scheduled(request))
        known.loading = num_external_tokens
        if num_external_tokens == 0:
            known.let_go()

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvoyantMetadata:
        """What this step loads, and what is there to be saved after it."""
        meta = KvoyantMetadata()
        for new in scheduler_output.scheduled_new_reqs:
            known = self._requests.get(new.req_id)
            if known is not None:
                known.blocks = list(new.block_ids[0])
                self._plan(meta, known, new.num_computed_tokens, scheduler_output)
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            known = self._requests.get(request_id)
            if known is None:
                continue
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                known.blocks = list(blocks[0]) if blocks else []
            elif blocks:
                known.blocks.extend(blocks[0])
            self._plan(meta, known, cached.num_computed_tokens[i], scheduler_output)
        return meta

    def _plan(self, meta: KvoyantMetadata, known: _Scheduled, computed: int, step: SchedulerOutput):
        request, block = known.request, self._shape.block
        tokens = request.all_token_ids
        if known.loading:
            first, known.loading = computed - known.loading, 0
            blocks = known.blocks[first // block : computed // block]
            meta.loads.append(Load(request.request_id, list(tokens[:computed]), first, computed, blocks))
            known.saved = max(known.saved, computed)
        if not self._saves:
            return
        # Drafts may be rejected, and tokens that are still being sampled have no number yet.
        drafts = len(step.scheduled_spec_decode_tokens.get(request.request_id, ()))
        there = min(computed + step.num_scheduled_tokens[request.request_id] - drafts, len(tokens))
        whole = there // self._shape.page * self._shape.page
        if whole > known.saved:
            known.saved = whole
            meta.saves.append(Save(request.request_id, list(tokens[:whole]), known.blocks[: whole // block]))

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Everything has been saved by the step that computed it: the blocks may go."""
        known = self._requests.pop(request.request_id, None)
        if known is not None:
            known.let_go()
        return False, None

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]):
        """Learns where the blocks lie: for each layer `[blocks, KV heads, tokens, 2 * head_dim]`."""
        shape = self._shape
        expected = (shape.kv_heads, shape.block, 2 * shape.half)
        if len(kv_caches) != shape.layers:
            raise ValueError(f"vLLM registers {len(kv_caches)} KV caches for {shape.layers} layers: kvoyant.vllm needs one for each")
        for name, cache in kv_caches.items():
            if cache.dim() != 4 or tuple(cache.shape[1:]) != expected or cache.dtype != shape.dtype:
                raise ValueError(
                    f"the KV cache of {name} is {cache.dtype} {tuple(cache.shape)}, and kvoyant.vllm knows {shape.dtype} "
                    f"(blocks, {', '.join(map(str, expected))}): use full attention with an unquantised cache"
                )
        self._caches = [kv_caches[name] for name in sorted(kv_caches, key=_layer_number)]

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Copies what this step loads into its blocks. Blocks that cannot be had are reported, and computed again."""
        for load in self._step().loads:
            try:
                self._load(load)
            except kvoyant.Error as error:
                logger.warning("%d tokens of request %s do not come from Kvoyant: %s", load.end - load.first, load.request, error)
                self._failed.update(load.blocks)
                self._keep_no_more(load.request)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are loaded before the first begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole steps are saved, not layers."""

    def wait_for_save(self):
        """Copies the blocks that this step has filled, and publishes them."""
        for save in self._step().saves:
            if self._failed.intersection(save.blocks):
                # What was computed from them in this step is wrong. vLLM computes it again; nobody else may find it.
                self._keep_no_more(save.request)
            if save.request in self._unsaved:
                continue
            try:
                self._save(save)
            except kvoyant.Error as error:
                logger.warning("request %s is not kept in Kvoyant from here on: %s", save.request, error)
                self._keep_no_more(save.request)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Lets go of requests that are over. Nothing is sent or received between steps."""
        for request in finished_req_ids:
            self._forget(request)
            self._unsaved.discard(request)
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of this step that could not be loaded."""
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self):
        """Ends the session."""
        self._sequences.clear()
        for known in self._requests.values():
            known.held = None
        self._caches = []
        self._model.close()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """No hook inside a layer does anything, so whole graphs may skip them."""
        return False

    def _step(self) -> KvoyantMetadata:
        meta = self._get_connector_metadata()
        if not isinstance(meta, KvoyantMetadata):
            raise TypeError(f"the step's connector metadata is {type(meta).__name__}, not KvoyantMetadata: is another connector configured?")
        if not self._caches and (meta.loads or meta.saves):
            raise RuntimeError("a step loads or saves before register_kv_caches()")
        return meta

    def _forget(self, request: str):
        sequence = self._sequences.pop(request, None)
        if sequence is not None:
            _close(sequence)

    def _keep_no_more(self, request: str):
        self._unsaved.add(request)
        self._forget(request)

    def _load(self, load: Load):
        self._forget(load.request)
        # One token more, since one is always left over; which one makes no difference.
        sequence = self._model.attach([*load.tokens, 0])
        self._sequences[load.request] = sequence
        if sequence.tokens < load.end:
            raise kvoyant.errors.NotReadyError(f"only {sequence.tokens} of {load.end} tokens are published any more")
        for layer, cache in enumerate(self._caches):
            keys, values = sequence.read(layer, load.first, load.end)
            # [KV heads, tokens, half] each to [blocks, KV heads, tokens of one, 2 * half]
            rows = torch.cat([torch.from_numpy(keys), torch.from_numpy(values)], dim=-1)
            rows = rows.unflatten(1, (len(load.blocks), self._shape.block)).transpose(0, 1)
            cache[torch.tensor(load.blocks, device=cache.device)] = rows.to(cache.device, cache.dtype)

    def _save(self, save: Save):
        sequence = self._sequences.get(save.request)
        if sequence is None:
            # Another request may have published a part of it.
            sequence = self._sequences[save.request] = self._model.attach([*save.tokens, 0])
        first, end = sequence.tokens, len(save.tokens)
        if first >= end:
            return
        blocks = save.blocks[first // self._shape.block :]
        sequence.reserve(end)
        for layer, cache in enumerate(self._caches):
            rows = cache[torch.tensor(blocks, device=cache.device)].transpose(1, 2).flatten(0, 1).cpu()
            keys, values = rows[..., : self._shape.half], rows[..., self._shape.half :]
            sequence.write(layer, keys.contiguous(), values.contiguous(), position=first)
        sequence.append(end - first)
        self._model.publish(sequence, save.tokens, shared=self._shared)


def _shape(config: VllmConfig, caches: KVCacheConfig) -> _Shape:
    """What the cache is made of; ValueError where this cannot keep it."""
    parallel = config.parallel_config
    for what, size in (
        ("tensor_parallel_size", parallel.tensor_parallel_size),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size),
        ("decode_context_parallel_size", getattr(parallel, "decode_context_parallel_size", 1)),
    ):
        if size != 1:
            raise ValueError(f"kvoyant.vllm keeps the KV of one worker, and {what} is {size}: set it to 1")
    groups = caches.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1 or kinds != ["FullAttentionSpec"]:
        raise ValueError(f"kvoyant.vllm keeps full attention alone, and this model's layers have {len(groups)} groups of {', '.join(kinds)}")
    spec = groups[0].kv_cache_spec
    if spec.dtype not in DTYPES:
        raise ValueError(f"the KV cache is {spec.dtype}, and kvoyant.vllm keeps float32, float16 and bfloat16: set kv_cache_dtype to auto")
    if getattr(spec, "head_size_v", spec.head_size) not in (None, spec.head_size):
        raise ValueError(f"keys have {spec.head_size} values and values {spec.head_size_v}: kvoyant.vllm needs as many of both")
    row = 2 * spec.head_size * spec.dtype.itemsize
    return _Shape(
        layers=len(groups[0].layer_names),
        query_heads=config.model_config.get_num_attention_heads(parallel),
        kv_heads=spec.num_kv_heads,
        half=spec.head_size,
        block=spec.block_size,
        page=math.lcm(spec.block_size, MEMORY_PAGE // math.gcd(MEMORY_PAGE, row)),
        dtype=spec.dtype,
    )


def _layout(config: VllmConfig, shape: _Shape) -> str:
    """What tells apart blocks that are laid out otherwise inside: a block comes back as it was, and is not looked into."""
    import vllm

    attention = getattr(getattr(config, "attention_config", None), "backend", None)
    device = config.device_config.device_type
    return f"vllm {vllm.__version__}, blocks of {shape.block} for {getattr(attention, 'name', attention or 'auto')} on {device}"


def _fingerprint(config: VllmConfig) -> str:
    """Of the model's name, revision, quantisation and configuration, not of its weights."""
    model = config.model_config
    hf = model.hf_config.to_dict() if hasattr(model.hf_config, "to_dict") else {}
    text = json.dumps([str(model.model), str(model.revision), str(model.quantization), str(model.dtype), hf], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
