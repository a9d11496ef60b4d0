"""Hugging Face Transformers with its KV in the daemon: two lines.

    from kvoyant.transformers import KvoyantCache
    with KvoyantCache(model, "/run/kvoyant/kvoyantd.sock", method="kvoyant:budget=12%") as cache:
        model.generate(**inputs, cache=cache)

Decoder-only models with rotary positions, on a CPU: Llama, Mistral, Qwen2 and what is built like them. Every row goes to the daemon's pages;
a decode step attends, in the layers that the daemon selects for, over sinks, what it selected, and the recent window, computed as the
reference engine does. Steps of several tokens, such as prompts and the check of drafted tokens, attend to everything.

Masked tokens (left padding) are never stored and never attended to: a row of the batch has the tokens of its own text, with keys rotated to the
positions that Transformers gave them.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Tuple

try:
    import torch
    import transformers
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
    from transformers.modeling_utils import AttentionInterface
except ImportError as error:
    raise ImportError(f"kvoyant.transformers needs torch and transformers: pip install 'kvoyant[transformers]' ({error})") from error

from . import _kvoyant

TESTED = "5.24"
"""The version of Transformers whose interfaces this is written for, and tested with."""

if ".".join(transformers.__version__.split(".")[:2]) != TESTED:
    raise ImportError(
        f"kvoyant.transformers is made for transformers {TESTED}, whose cache and attention interfaces change from one minor version to the "
        f"next, and this is {transformers.__version__}: pip install 'transformers=={TESTED}.*'"
    )

__all__ = ["ATTENTION", "KvoyantCache"]

ATTENTION = "kvoyant"
"""The name that the attention function is registered by, for ``attn_implementation``."""

_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

_ROOM = 256
"""Tokens by which a sequence grows at least, so that not every step asks for room."""


class _Layer(CacheLayerMixin):
    """What Transformers asks of one layer; the cache has the answers."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: KvoyantCache):
        super().__init__()
        self._cache = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing: the daemon has the memory."""

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError("layers of a KvoyantCache have no rows of their own: call update() of the cache")

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> Tuple[int, int]:
        return self._cache.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class _Step:
    """A forward pass under way."""

    def __init__(self, real: torch.Tensor, first: List[int]):
        self.real = real
        """Which of the new tokens are text, ``[batch, tokens]``."""
        self.first = first
        """Tokens of each row before them."""
        self.counts = real.sum(1).tolist()
        self.whole = bool(real.all())
        self.layer = 0


class KvoyantCache(Cache):
    """A cache whose rows lie in the daemon.

    model: the model that is to generate; its attention is set to ``kvoyant``.
    socket: the daemon's control socket.
    method: a selection method that asks for no more than queries, such as ``kvoyant:budget=12%``, ``quest``, or ``full``.
    sinks, window: tokens that are always attended to, the first and the most recent ones.
    dense_layers: layers before this one attend to everything.
    context_tokens: the longest sequence, which sizes the answers (default: what the model was made for, 32,768 at most).
    batch_max: the most sequences of a step.
    dtype: how rows are stored (default: the model's type).

    ``reset()`` forgets the text, for another one. ``copy.deepcopy(cache)`` is a fork: the text so far is shared, what follows is not.
    """

    def __init__(
        self,
        model: Any,
        socket: str,
        *,
        method: str = "kvoyant:budget=12%",
        sinks: int = 4,
        window: int = 64,
        dense_layers: int = 2,
        context_tokens: Optional[int] = None,
        batch_max: int = 32,
        dtype: Optional[str] = None,
        timeout: float = 30.0,
    ):
        config = model.config.get_text_config(decoder=True)
        if config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
            raise ValueError(f"{type(model).__name__} is no decoder-only model with exchangeable attention")
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        context = min(context_tokens or config.max_position_embeddings, context_tokens or 32768)
        self._sliding = _sliding_windows(config, context)
        if dtype is None:
            dtype = _DTYPES.get(model.dtype)
            if dtype is None:
                raise ValueError(f"rows of {model.dtype} cannot be stored: name a dtype, such as f16")
        # As many answers as the reference engine keeps, each with room for every row in a run of its own and all estimates.
        values = batch_max * self._heads * (2 * self._width + 9) * 4
        table = batch_max * self._kv_heads * (16 + 12 * (context + 2)) + values
        self._session = _kvoyant.connect(
            socket,
            layers=config.num_hidden_layers,
            query_heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=self._width,
            methods=[method],
            dtype=dtype,
            sinks=sinks,
            window=window,
            dense_layers=dense_layers,
            sliding_layers=[layer for layer, reach in enumerate(self._sliding) if reach is not None],
            name=f"transformers {type(model).__name__}",
            ring_slots=4,
            batch_max=batch_max,
            hint_bytes=max(batch_max * self._heads * (self._width + 1) * 4, 4096),
            table_bytes=min(max(table, 4096), 24 << 20),
            control_timeout=timeout,
        )
        self._timeout = timeout
        self._layers = config.num_hidden_layers
        self._begin_empty()
        super().__init__(layers=[_Layer(self) for _ in range(self._layers)])
        model.set_attn_implementation(ATTENTION)

    def _begin_empty(self) -> None:
        self._sequences: List[_kvoyant.Sequence] = []
        self._real = torch.zeros((0, 0), dtype=torch.bool)
        self._step: Optional[_Step] = None
        self._handed: Optional[int] = None
        self._missed = [0, 0.0, 0.0]

    # What Transformers calls.

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Hands the new rows on to the attention function, which stores them; they come back as they are."""
        if self._handed is not None:
            raise RuntimeError(
                f"layer {self._handed} has not attended by kvoyant: the model's attention was changed after the cache was made; call "
                f"model.set_attn_implementation('{ATTENTION}')"
            )
        self._handed = layer_idx
        key_states = key_states.view_as(key_states)
        key_states._kvoyant = (self, layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, masked ones among them."""
        return self._real.shape[1]

    @property
    def batch_size(self) -> int:
        return len(self._sequences) or -1

    def reset(self) -> None:
        """Forgets the text."""
        self._session.close_sequences(self._sequences)
        self._begin_empty()

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens, as many as the negative number says: drafts that were rejected."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): a negative number says how many tokens to remove")
        left = max(self.get_seq_length() + tokens_to_remove, 0)
        for row, sequence in enumerate(self._sequences):
            gone = int(self._real[row, left:].sum())
            if gone:
                sequence.truncate(sequence.tokens - gone)
        self._real = self._real[:, :left]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Has row i go on with the text of row ``beam_idx[i]``: beams that go on more than once are forked."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Has each text go on so many times."""
        self._select([row for row in range(len(self._sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows."""
        rows = torch.arange(len(self._sequences))[indices.cpu()]
        self._select(rows.tolist())

    def _select(self, rows: List[int]) -> None:
        if rows == list(range(len(self._sequences))):
            return
        before, goes_on, after = self._sequences, set(), []
        for row in rows:
            after.append(before[row].fork() if row in goes_on else before[row])
            goes_on.add(row)
        self._sequences = after
        self._real = self._real[rows]
        self._session.close_sequences([sequence for row, sequence in enumerate(before) if row not in goes_on])

    def __deepcopy__(self, memo: Dict[int, Any]) -> KvoyantCache:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.layers = [_Layer(copy) for _ in range(self._layers)]
        copy._sequences = [sequence.fork() for sequence in self._sequences]
        copy._step = copy._handed = None
        copy._missed = [0, 0.0, 0.0]
        memo[id(self)] = copy
        return copy

    # What users call.

    def certificate(self) -> Optional[Dict[str, float]]:
        """How much attention decode steps can have missed since the text began: ``answers`` (of one query head each), ``missed_mass_mean`` and
        ``missed_mass_max``, bounds that the method gave. None for methods that give none."""
        answers, total, most = self._missed
        if not answers:
            return None
        return {"answers": answers, "missed_mass_mean": total / answers, "missed_mass_max": most}

    def counters(self) -> Dict[str, int]:
        """What the daemon has counted for the session: see ``kvoyant.Model.counters``."""
        return self._session.counters()

    def close(self) -> None:
        """Closes its sequences; the session ends with its last cache."""
        if not self._session.closed:
            self._session.close_sequences([sequence for sequence in self._sequences if not sequence.closed])
        self._begin_empty()

    def __enter__(self) -> KvoyantCache:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # A forward pass.

    def _begin(self, batch: int, count: int, mask: Optional[torch.Tensor]) -> None:
        if not self._sequences:
            self._sequences = [self._session.open(count + _ROOM) for _ in range(batch)]
            self._real = torch.zeros((batch, 0), dtype=torch.bool)
        if len(self._sequences) != batch:
            raise ValueError(f"a batch of {batch}, where the cache has {len(self._sequences)} texts: reset() it, or use another cache")
        real = torch.ones((batch, count), dtype=torch.bool)
        if mask is not None:
            if mask.ndim != 2:
                raise ValueError(f"a mask of {mask.ndim} dimensions: kvoyant attends causally, and takes masks [batch, tokens] of padding alone")
            real = mask[:, -count:].to("cpu", torch.bool)
        step = _Step(real, [sequence.tokens for sequence in self._sequences])
        short = [
            (sequence, first + new + _ROOM)
            for sequence, first, new in zip(self._sequences, step.first, step.counts)
            if first + new > sequence.room
        ]
        if short:
            self._session.reserve([sequence for sequence, _ in short], [tokens for _, tokens in short])
        self._step = step

    def _attend(self, layer: int, query, key, value, mask, scaling: Optional[float], sliding_window: Optional[int]) -> torch.Tensor:
        """``query`` is ``[batch, query heads, tokens, d]``, ``key`` and ``value`` are the new rows; gives ``[batch, tokens, query heads, d]``."""
        self._handed = None
        if query.device.type != "cpu":
            raise ValueError(f"the model is on {query.device}: kvoyant attends on the CPU here")
        batch, _, count, width = query.shape
        if layer == 0:
            self._begin(batch, count, mask)
        step = self._step
        if step is None or step.layer != layer:
            raise RuntimeError(f"layer {layer} attends out of order: a forward pass goes through all layers, the first one first")
        keys, values = key.detach().transpose(1, 2), value.detach().transpose(1, 2)
        for row, sequence in enumerate(self._sequences):
            if step.counts[row]:
                here = slice(None) if step.whole else step.real[row]
                sequence.write(layer, keys[row][here].contiguous(), values[row][here].contiguous(), position=step.first[row])
        scale = scaling if scaling is not None else 1 / math.sqrt(width)
        if count == 1 and all(step.first):
            out = self._decode(layer, step, query, scale * math.sqrt(width))
        elif step.whole and not any(step.first):
            # The usual prompt: all of one length, nothing before it.
            causal = None if self._sliding[layer] is None else _visible(0, count, self._sliding[layer])
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=causal, is_causal=causal is None, scale=scale, enable_gqa=True
            ).transpose(1, 2)
        else:
            out = self._block(layer, step, query, keys, values, scale)
        step.layer += 1
        if step.layer == self._layers:
            grown = [row for row, new in enumerate(step.counts) if new]
            self._session.append([self._sequences[row] for row in grown], [step.counts[row] for row in grown])
            self._real = torch.cat([self._real, step.real], 1)
            self._step = None
        return out.contiguous()

    def _decode(self, layer: int, step: _Step, query, stretch: float) -> torch.Tensor:
        """One token of each row, over what the daemon selects."""
        rows = [row for row, new in enumerate(step.counts) if new]
        queries = query[rows, :, 0].detach().float()
        if abs(stretch - 1) > 1e-6:
            queries = queries * stretch
        out = torch.zeros((query.shape[0], 1, self._heads, self._width), dtype=query.dtype)
        if rows:
            attended = self._session.attend(
                layer,
                [self._sequences[row] for row in rows],
                queries.contiguous(),
                positions=[step.first[row] for row in rows],
                reach=self._sliding[layer],
                timeout=self._timeout,
            )
            out[rows, 0] = torch.from_numpy(attended.out).to(query.dtype)
            if attended.missed_mass is not None:
                known = attended.missed_mass[attended.missed_mass == attended.missed_mass]
                if known.size:
                    self._missed[0] += int(known.size)
                    self._missed[1] += float(known.sum())
                    self._missed[2] = max(self._missed[2], float(known.max()))
        return out

    def _block(self, layer: int, step: _Step, query, keys, values, scale: float) -> torch.Tensor:
        """Several tokens of each row, over everything before them and one another."""
        batch, _, count, _ = query.shape
        out = torch.zeros((batch, count, self._heads, self._width), dtype=query.dtype)
        for row, sequence in enumerate(self._sequences):
            first, new = step.first[row], step.counts[row]
            if not new:
                continue
            here = step.real[row]
            if first:
                k, v = (torch.from_numpy(rows).to(query.dtype) for rows in self._read(layer, sequence, first, new))
            else:
                k, v = keys[row][here].transpose(0, 1), values[row][here].transpose(0, 1)
            attended = torch.nn.functional.scaled_dot_product_attention(
                query[row : row + 1][:, :, here], k[None], v[None],
                attn_mask=_visible(first, new, self._sliding[layer]), scale=scale, enable_gqa=True,
            )
            out[row, here] = attended[0].transpose(0, 1)
        return out


    def _read(self, layer: int, sequence, first: int, new: int):
        """Keys and values of all tokens of a row, those that were written just now with them."""
        if not self._session.spills:
            return sequence.read(layer, 0, first + new)
        # What lies on disk has to be here, and stays until it has been copied.
        with self._session.fetch(layer, [sequence], positions=[first]).wait(self._timeout):
            return sequence.read(layer, 0, first + new)


def _visible(first: int, count: int, reach: Optional[int]) -> torch.Tensor:
    """Which of ``first + count`` tokens the last ``count`` attend to, ``[count, first + count]``."""
    at, other = torch.arange(first, first + count)[:, None], torch.arange(first + count)[None]
    visible = other <= at
    return visible if reach is None else visible & (other > at - reach)


def _sliding_windows(config: Any, context: int) -> List[Optional[int]]:
    """By layer, how many tokens attention reaches back, the current one included; None where that is all of a context."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [
        "sliding_attention" if window is not None else "full_attention"
    ] * config.num_hidden_layers
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layers of {', '.join(sorted(unknown))} have no rows that kvoyant could keep")
    return [window if kind == "sliding_attention" and window is not None and window < context else None for kind in types]


def _attention(
    module, query, key, value, attention_mask, dropout: float = 0.0, scaling: Optional[float] = None,
    sliding_window: Optional[int] = None, softcap: Optional[float] = None, **kwargs,
):
    """What Transformers calls for each layer, in place of its own attention."""
    if softcap is not None or dropout:
        raise ValueError("kvoyant attends without soft-capping and without dropout: generate with model.eval()")
    handed = getattr(key, "_kvoyant", None)
    if handed is not None:
        cache, layer = handed
        return cache._attend(layer, query, key, value, attention_mask, scaling, sliding_window), None
    if key.shape[2] != query.shape[2]:
        raise ValueError("attention 'kvoyant' with another cache: pass a KvoyantCache, or set the model's attention back, as to 'sdpa'")
    # Without a cache: attention to everything, as Transformers computes it.
    visible = _visible(0, query.shape[2], sliding_window)[None, None].to(query.device)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :]
        # Masked tokens see themselves, so that no row of the softmax is empty.
        visible = visible | torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
# Masks of padding as they are, [batch, tokens], or none: causality is not in them.
AttentionMaskInterface.register(ATTENTION, flash_attention_mask)
