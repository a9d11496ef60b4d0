"""What the attention backend keeps of the daemon's: a session for a model, sequences for its requests, and the step that is under way.

Nothing here is vLLM's, so that it can be tried without.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import kvoyant
from kvoyant import errors

logger = logging.getLogger("vllm.kvoyant")

TABLE_BYTES = (64 << 20) - (1 << 16)
"""Room for an answer, of four that a session may have: so many members are asked for at once as fit."""


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

    def __init__(self, socket, method, layers, query_heads, kv_heads, head_dim, dtype, most, context):
        # The largest answer of one member: each row in a run of its own, and all estimates.
        table = kv_heads * (16 + 12 * (context + 2)) + query_heads * (2 * head_dim + 9) * 4
        self.at_once = max(1, min(most, TABLE_BYTES // table))
        self.model = kvoyant.connect(
            socket,
            name="vllm-attention",
            layers=layers,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            methods=[method],
            ring_slots=4,
            batch_max=max(64, most),
            hint_bytes=max(4096, self.at_once * query_heads * (head_dim + 1) * 4),
            # Of a context that is longer still, an answer that does not fit is refused, and attended densely.
            table_bytes=min(max(4096, self.at_once * table), TABLE_BYTES),
            # Those of a step, and as many again twice that wait.
            sequences_max=max(64, 3 * most),
        )
        self.layers = layers
        self.most = most
        # By the block of the last token; the least recently used first.
        self.live: dict[int, Live] = {}
        self.members: list[Member] = []
        self.next = 0
        # How many rows of a step attended to a selection, since the beginning.
        self.sparse = 0
        self._said = set()
        # Blocks of the last tokens of this step's requests.
        self.wanted = set()

    def begin(self, starts, lengths, tables, block):
        """A step over requests: tokens `starts[i]..starts[i + 1]` of the batch are the last of `lengths[i]`, whose blocks are `tables[i]`."""
        self.members, self.next = [], 0
        tokens = [lengths[i] - (starts[i + 1] - starts[i]) for i in range(len(lengths))]
        self.wanted = {tables[i][(start - 1) // block] for i, start in enumerate(tokens) if start > 0}
        for i, length in enumerate(lengths):
            row, count = starts[i], starts[i + 1] - starts[i]
            start = length - count
            blocks = tables[i][: -(-length // block)]
            live = self._known(start, blocks, block)
            if live is not None:
                try:
                    self._with_room(lambda live=live, length=length: live.sequence.reserve(length))
                except kvoyant.Error as error:
                    self._say(error)
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
            return Live(self._with_room(lambda: self.model.open(0)))
        except kvoyant.Error as error:
            self._say(error)
            return None

    def _with_room(self, call):
        """Calls; where memory is used up, what no request of this step has is closed first, the longest unused of it, one by one."""
        while True:
            try:
                return call()
            except (errors.BackpressureError, errors.QuotaError):
                unused = next((last for last in self.live if last not in self.wanted), None)
                if unused is None:
                    raise
                self._close(self.live.pop(unused))

    def _say(self, error):
        """Warns, once for each kind of error: there is one a request, or a layer."""
        kind = type(error)
        log = logger.debug if kind in self._said else logger.warning
        self._said.add(kind)
        log("attention is dense where a selection was wanted: %s", error)

    def give_up(self, error):
        """The requests of this step are not attended sparsely any more: the daemon does not say what they need."""
        self._say(error)
        for member in self.members:
            if member.live is not None:
                self._close(member.live)
                member.live = None

    def _close(self, live):
        try:
            live.sequence.close()
        except kvoyant.Error as error:
            logger.debug("closing a sequence: %s", error)

    def write(self, layer, key, value):
        """Keys and values of the batch in one layer, `[tokens, KV heads, head_dim]`, contiguous."""
        if layer != self.next:
            raise RuntimeError(f"layer {layer} attends where layer {self.next} should: kvoyant.vllm.attention needs all layers, in order")
        self.next += 1
        for member in self.members:
            if member.live is not None:
                rows = slice(member.row, member.row + member.count)
                member.live.sequence.write(layer, key[rows], value[rows], position=member.start)

    def chosen(self):
        """Members that decode one token, and are known."""
        return [member for member in self.members if member.live is not None and member.count == 1 and member.start > 0]

    def attend(self, layer, query):
        """Attention of the members that are chosen, by row of the batch: `[query heads, head_dim]`, float32 as `query` `[tokens, query heads, head_dim]`."""
        members, found = self.chosen(), {}
        for at in range(0, len(members), self.at_once):
            part = members[at : at + self.at_once]
            rows = [member.row for member in part]
            attended = self.model.attend(
                layer,
                [member.live.sequence for member in part],
                query[rows],
                positions=[member.start for member in part],
            )
            found.update(zip(rows, attended.out))
        self.sparse += len(found)
        return found

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
