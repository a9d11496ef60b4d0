"""Kvoyant from an inference engine's side: connect, keep sequences in the daemon, ask for the rows of the next layer while this one runs.

    import kvoyant, numpy
    with kvoyant.connect("/run/kvoyant/kvoyantd.sock", layers=30, query_heads=9, kv_heads=3, head_dim=64) as model:
        with model.open(tokens=2048) as sequence:
            sequence.write(0, keys, values)                      # one layer's K and V, straight into its pages
            sequence.append(len(keys))                           # ... of all layers: now they are there
            out, lse, *_ = sequence.attend(2, query)             # what the reference engine computes

numpy is all that it needs; ``kvoyant.transformers`` needs torch and transformers too.
"""

from typing import Any, NamedTuple, Optional

from . import errors
from ._kvoyant import Model, Pending, Ready, Rows, Sequence, __version__, connect
from .errors import Error

__all__ = [
    "Attended",
    "Error",
    "Model",
    "Pending",
    "Ready",
    "Rows",
    "Sequence",
    "connect",
    "errors",
    "__version__",
]


class Attended(NamedTuple):
    """What attention gave. The first dimension is that of the members; it is missing where one sequence attended alone."""

    out: Any
    """float32 ``[members, query heads, value_values]``: the softmax over all rows attended, with the estimate of the others merged in."""
    lse: Any
    """float32 ``[members, query heads]``: logarithm of the sum of the exponentials of the scaled scores, the estimate among them."""
    missed_mass: Optional[Any] = None
    """float32 ``[members, query heads]``: at least the attention probability of the rows left out; NaN where it is not known. None where
    nothing is."""
    error: Optional[Any] = None
    """float32 ``[members, query heads]``: at least the norm of the output's error, in units of the values; as ``missed_mass``."""
