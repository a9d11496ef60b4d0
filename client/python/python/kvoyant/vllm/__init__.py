"""vLLM with its KV in Kvoyant: prefix reuse between requests, instances and restarts, and sparse attention.

    vllm serve MODEL --disable-hybrid-kv-cache-manager --kv-transfer-config '{
        "kv_connector": "KvoyantConnector", "kv_connector_module_path": "kvoyant.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": {"socket": "/run/kvoyant/kvoyantd.sock"}}'

The connector keeps and brings back whole blocks of KV. It sees no queries and cannot change what attention reads: that is what the attention backend
is for (``kvoyant.vllm.attention``).

Importing this module compares vLLM's own interface with the one that this was written for, and says what differs.
"""

from ._interface import TESTED, check

check()

from .connector import KvoyantConnector, KvoyantMetadata, Load, Save  # noqa: E402  the interface is checked first

__all__ = ["TESTED", "KvoyantConnector", "KvoyantMetadata", "Load", "Save"]
