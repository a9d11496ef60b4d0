"""What of vLLM's interface is used here, as it was in the version that this was written for."""

import importlib
import inspect
import json
import pathlib

_RECORD = json.loads(pathlib.Path(__file__).with_name("interface.json").read_text())

TESTED = _RECORD["vllm"]
"""Version of vLLM that the record was made from, and the tests ran with."""

MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
CLASS = "KVConnectorBase_V1"


def parameters(function):
    """Names of a method's parameters, `self` or `cls` left out; those with a default end in `=`."""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", "cls"):
            continue
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        found.append(stars + name + ("" if parameter.default is parameter.empty else "="))
    return found


def differences(base):
    """What of a base class is not as recorded: sentences."""
    for name, recorded in _RECORD["methods"].items():
        method = inspect.getattr_static(base, name, None)
        if method is None:
            yield f"{CLASS}.{name} is not there"
            continue
        now = parameters(getattr(method, "__func__", method))
        if now != recorded:
            yield f"{CLASS}.{name} takes ({', '.join(now)}), and not ({', '.join(recorded)})"
    known = set(_RECORD["methods"])
    for name in sorted(getattr(base, "__abstractmethods__", ())):
        if name not in known:
            yield f"{CLASS}.{name} has to be implemented, and was not there"


def check():
    """Raises ImportError where vLLM is missing, or its interface is another one."""
    try:
        vllm = importlib.import_module("vllm")
        base = getattr(importlib.import_module(MODULE), CLASS)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"kvoyant.vllm needs vLLM with {CLASS} (it was tested with {TESTED}): {error}") from error
    found = list(differences(base))
    if found:
        version = getattr(vllm, "__version__", "unknown")
        raise ImportError(
            f"vLLM {version} has another interface than {TESTED}, which kvoyant.vllm was tested with: {'; '.join(found)}. "
            f"Install vllm=={TESTED}, or a kvoyant that knows this version"
        )
