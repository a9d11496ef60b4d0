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

import os
import re
from typing import Any, ClassVar

import kvoyant
import torch
from kvoyant._vllm_plugin import METHOD
from kvoyant._vllm_sessions import Sessions
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

SOCKET = "KVOYANT_VLLM_SOCKET"
DEFAULT_SOCKET = "/run/kvoyant/kvoyantd.sock"


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
        self._context = config.model_config.max_model_len
        self._layer: int | None = None

    def _shared(self, query: torch.Tensor) -> Sessions:
        global _sessions
        if _sessions is None:
            dtype = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[query.dtype]
            socket, method = os.environ.get(SOCKET, DEFAULT_SOCKET), os.environ[METHOD]
            shape = (self._layers, self.num_heads, self.num_kv_heads, self.head_size, dtype, self._most, self._context)
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
        attended = {}
        try:
            shared.write(self._layer, key.contiguous(), value.contiguous())
            attended = shared.attend(self._layer, query.float())
        except kvoyant.Error as error:
            # vLLM has all rows too, and goes on with them.
            shared.give_up(error)
        if len(attended) < len(shared.members):
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if attended:
            rows = torch.stack([torch.as_tensor(out) for out in attended.values()])
            output.view(-1, self.num_heads, self.head_size)[list(attended)] = rows.to(output.dtype)
        if self._layer + 1 == shared.layers:
            try:
                shared.end(block)
            except kvoyant.Error as error:
                shared.give_up(error)
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
