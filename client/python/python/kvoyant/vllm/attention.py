"""Sparse attention in vLLM: decode steps attend to what a method selects, through the daemon.

    KVOYANT_VLLM_METHOD="quest:budget=12%,hint=current" KVOYANT_VLLM_SOCKET=/run/kvoyant/kvoyantd.sock vllm serve MODEL --no-enable-prefix-caching

The package's plugin puts :class:`KvoyantAttentionBackend` in the place of vLLM's backend for the CPU, where these are set. Prompts are attended by vLLM's own
kernel. K and V of every token go to the daemon besides; a request's decode steps then ask it for the rows that matter, with the true query of each
layer, and attend to them alone.

A backend is not told which request a row of its batch is. It goes by block tables: a sequence is known by the block of its last token, and goes on only
where the table and the length go on as well. One that it does not know, because its first tokens came from a prefix cache, attends densely.

On GPUs there is no such backend here: queries would have to cross to the host in each layer.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import kvoyant
import torch
from kvoyant._vllm_plugin import METHOD
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

logger = logging.getLogger("vllm.kvoyant")

SOCKET = "KVOYANT_VLLM_SOCKET"
DEFAULT_SOCKET = "/run/kvoyant/kvoyantd.sock"


@dataclass
class Live:
    """A request that is decoded, as its block table shows it."""

    sequence: Any
    blocks: list[int] = field(default_factory=list)
    tokens: int = 0


@dataclass
class Member:
    """A request's part in a step: tokens `start..start + count`, which are rows `row..row + count` of the batch."""

    live: Live | None
    row: int
    start: int
    count: int


class Sessions:
    """What the layers of one model share: a session, its sequences, and the step that is under way."""

    def __init__(self, socket, method, layers, query_heads, kv_heads, head_dim, dtype, most):
        self.model = kvoyant.connect(
            socket,
            name="vllm-attention",
            layers=layers,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            methods=[method],
            batch_max=max(64, most),
            sequences_max=max(64, 2 * most),
        )
        self.layers = layers
        self.most = most
        # By the block of the last token; the least recently used first.
        self.live: dict[int, Live] = {}
        self.members: list[Member] = []
        self.next = 0
        # How many rows of a step attended to a selection, since the beginning.
        self.sparse = 0

    def begin(self, starts, lengths, tables, block):
        """A step over requests: tokens `starts[i]..starts[i + 1]` of the batch are the last of `lengths[i]`, whose blocks are `tables[i]`."""
        self.members, self.next = [], 0
        for i, length in enumerate(lengths):
            row, count = starts[i], starts[i + 1] - starts[i]
            start = length - count
            blocks = tables[i][: -(-length // block)]
            live = self._known(start, blocks, block)
            if live is not None:
                try:
                    live.sequence.reserve(length)
                except kvoyant.Error as error:
                    logger.warning("a request of %d tokens attends densely: %s", length, error)
                    self._close(live)
                    live = None
            self.members.append(Member(live, row, start, count))
            if live is not None:
                live.blocks = blocks
        self.next = 0

    def _known(self, start, blocks, block):
        if start > 0:
            live = self.live.pop(blocks[(start - 1) // block], None)
            if live is None:
                return None
            if live.tokens == start and live.blocks == blocks[: len(live.blocks)]:
                return live
            self._close(live)
            return None
        # Blocks that are written from their beginning are nobody else's any more.
        for last in [last for last, live in self.live.items() if set(live.blocks) & set(blocks)]:
            self._close(self.live.pop(last))
        while len(self.live) >= 2 * self.most:
            self._close(self.live.pop(next(iter(self.live))))
        try:
            return Live(self.model.open(0))
        except kvoyant.Error as error:
            logger.warning("a request attends densely: %s", error)
            return None

    def _close(self, live):
        try:
            live.sequence.close()
        except kvoyant.Error as error:
            logger.debug("closing a sequence: %s", error)

    def write(self, layer, key, value):
        """Keys and values of the batch in one layer."""
        if layer != self.next:
            raise RuntimeError(f"layer {layer} attends where layer {self.next} should: kvoyant.vllm.attention needs all layers, in order")
        self.next += 1
        for member in self.members:
            if member.live is not None:
                rows = slice(member.row, member.row + member.count)
                member.live.sequence.write(layer, key[rows].contiguous(), value[rows].contiguous(), position=member.start)

    def chosen(self):
        """Members that decode one token, and are known."""
        return [member for member in self.members if member.live is not None and member.count == 1 and member.start > 0]

    def attend(self, layer, members, query):
        """Attention of these members: `[members, query heads, head_dim]`, float32."""
        rows = [member.row for member in members]
        attended = self.model.attend(
            layer,
            [member.live.sequence for member in members],
            query[rows].float().contiguous(),
            positions=[member.start for member in members],
        )
        self.sparse += len(rows)
        return rows, torch.as_tensor(attended.out)

    def end(self, block):
        """The last layer is done: the step's tokens count."""
        lives = [member for member in self.members if member.live is not None]
        if lives:
            self.model.append([member.live.sequence for member in lives], [member.count for member in lives])
        for member in lives:
            live = member.live
            live.tokens = member.start + member.count
            self.live[live.blocks[(live.tokens - 1) // block]] = live
        self.members = []


_sessions: Sessions | None = None


def sessions() -> Sessions | None:
    """This process's, if a layer has attended."""
    return _sessions


class KvoyantAttentionImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        if self.attn_type != AttentionType.DECODER or self.kv_sharing_target_layer_name is not None:
            raise ValueError("kvoyant.vllm.attention has decoder layers with a KV cache of their own, and this model has others")
        refused = {
            "ALiBi": self.alibi_slopes is not None,
            "a sliding window": self.sliding_window != -1,
            "capped logits": bool(self.logits_soft_cap),
            "attention sinks": self.sinks is not None,
            "a quantised KV cache": self.is_fp8_kv_cache,
            f"a scale of {self.scale}": abs(self.scale * self.head_size**0.5 - 1) > 1e-6,
        }
        found = [what for what, is_so in refused.items() if is_so]
        if found:
            raise ValueError(f"kvoyant.vllm.attention does not have {', '.join(found)}: unset {METHOD}")
        if config.parallel_config.tensor_parallel_size != 1 or config.parallel_config.pipeline_parallel_size != 1:
            raise ValueError(f"kvoyant.vllm.attention is for one worker: set the parallel sizes to 1, or unset {METHOD}")
        self._layers = config.model_config.get_num_layers(config.parallel_config)
        self._most = config.scheduler_config.max_num_seqs
        self._layer: int | None = None

    def _shared(self, query: torch.Tensor) -> Sessions:
        global _sessions
        if _sessions is None:
            dtype = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[query.dtype]
            socket, method = os.environ.get(SOCKET, DEFAULT_SOCKET), os.environ[METHOD]
            shape = (self._layers, self.num_heads, self.num_kv_heads, self.head_size, dtype, self._most)
            _sessions = Sessions(socket, method, *shape)
        return _sessions

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None):
        if attn_metadata is None:
            return output
        if self._layer is None:
            numbers = re.findall(r"\d+", layer.layer_name)
            self._layer = int(numbers[0]) if numbers else 0
        shared = self._shared(query)
        block = kv_cache.shape[2]
        if self._layer == 0:
            shared.begin(
                attn_metadata.query_start_loc.tolist(),
                attn_metadata.seq_lens.tolist(),
                attn_metadata.block_table.tolist(),
                block,
            )
        shared.write(self._layer, key, value)
        members = shared.chosen()
        if len(members) < len(shared.members):
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if members:
            rows, attended = shared.attend(self._layer, members, query)
            output.view(-1, self.num_heads, self.head_size)[rows] = attended.to(output.dtype)
        if self._layer + 1 == shared.layers:
            shared.end(block)
        return output


class KvoyantAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """As of vLLM's backend; graphs that would skip this Python are never captured."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER


class KvoyantAttentionBackend(CPUAttentionBackend):
    """vLLM's backend for the CPU, whose decode steps go through Kvoyant."""

    @staticmethod
    def get_impl_cls():
        return KvoyantAttentionImpl

    @staticmethod
    def get_builder_cls():
        return KvoyantAttentionMetadataBuilder
