"""vLLM calls register() in each of its processes (entry point `vllm.general_plugins`). Nothing happens unless KVOYANT_VLLM_METHOD is set."""

import os

METHOD = "KVOYANT_VLLM_METHOD"


def register():
    """Puts kvoyant.vllm.attention in the place of vLLM's attention on the CPU, if it is asked for."""
    if not os.environ.get(METHOD):
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "kvoyant.vllm.attention.KvoyantAttentionBackend")
