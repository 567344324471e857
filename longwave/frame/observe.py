"""What a memory layer may know of a forward pass, and what it remembers of earlier ones.

A method says what it `Needs`; the frame provides just that, in ordinary passes, chunks, steps and forked caches alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Needs:
    """What a method asks of the frame.

    queries: of the last so many tokens of each row, rotated, as they met the keys. mass: the attention that each stored
    token got so far, a column of the token store. positions: of each stored token, a column too. unrotated: a model
    whose rotation can be undone (`Pass.rotary`). hidden: the input of the attention module, in `Pass.hidden`.
    """

    queries: int = 0
    mass: bool = False
    positions: bool = False
    unrotated: bool = False
    hidden: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            max(self.queries, other.queries),
            self.mass or other.mass,
            self.positions or other.positions,
            self.unrotated or other.unrotated,
            self.hidden or other.hidden,
        )

    def columns(self) -> dict[str, torch.dtype]:
        """The side columns that a token store keeps for this."""
        return ({"position": torch.int32} if self.positions else {}) | ({"mass": torch.float32} if self.mass else {})

    def nbytes(self, query_heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes a row beside its tokens: the remembered queries and their positions."""
        return self.queries * (query_heads * head_dim * itemsize + 8)


@dataclass
class Pass:
    """One forward pass, as one layer sees it.

    q [batch, query_heads, tokens, head_dim], k and v [batch, kv_heads, tokens, head_dim]: the new tokens, rotated.
    valid bool [batch, tokens]: which of them are real; None for all. mask: a caller's own 4D mask (bool or additive).
    positions int [batch or 1, tokens] as the model has them, None where it does not say. module: the attention module
    (its layer's rotary table, its output projection). rotary: turns and un-turns keys (rotary.py), where asked for.
    phase: "prompt" (nothing is stored yet), "step" (one token a row) or "chunk". sinks [query_heads]: learned scores
    of a token that has no value and takes its share of attention. lse float [batch, query_heads, tokens]: log of what
    the softmax divides by, where it is known.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scaling: float
    causal: bool = True
    valid: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    module: Any = None
    rotary: Any = None
    hidden: torch.Tensor | None = None
    phase: str = "chunk"
    sinks: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    def unrotated(self) -> torch.Tensor:
        """The new keys before rotation: as k. Needs(unrotated=True)."""
        return self.rotary.unrotate(self.module, self.k, self.known_positions())

    def known_positions(self) -> torch.Tensor:
        """positions [batch, tokens]; ValueError where the model does not say them."""
        if self.positions is None:
            raise ValueError(
                f"{type(self.module).__name__} does not hand position_ids to the attention function, and this method "
                "needs them"
            )
        return self.positions.expand(self.q.shape[0], -1)


@dataclass(frozen=True, eq=False)
class Step:
    """Where a step's token goes and what it sees, as the device counts: tensors that stay where they are.

    rows int64 [batch]: 0, 1, 2 ... at int64 [batch]: the dense column that the new token of each row takes. seen int32
    [batch, 1]: dense tokens once it is there. counts int32 [batch]: pages. total int64 [batch]: real tokens of the row
    before it. positions int64 [batch, 1]: the model's own. live bool [batch]: whether the row's step counts; where not,
    nothing is evicted. A layer that evicts in a step takes off `at` and `seen`, which all advance by one behind it.
    """

    rows: torch.Tensor
    at: torch.Tensor
    seen: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor
    positions: torch.Tensor
    live: torch.Tensor


class Queries:
    """The queries of the last tokens of each row: the newest at the right end.

    q [batch, query_heads, width, head_dim]; positions int64 [batch, width]; row b remembers its last counts[b].
    """

    def __init__(self, width: int, counts: list[int]):
        self.width, self.counts = width, counts
        self.q: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.q, self.positions) if x is not None]

    def _room(self, q: torch.Tensor) -> None:
        if self.q is None:
            self.q = q.new_zeros(q.shape[0], q.shape[1], self.width, q.shape[3])
            self.positions = torch.zeros(q.shape[0], self.width, dtype=torch.long, device=q.device)

    def add(self, q: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Remember q [batch, query_heads, tokens, head_dim] of a pass, padding left out; positions [batch, tokens]."""
        self._room(q)
        assert self.q is not None
        assert self.positions is not None
        if valid is None:
            new = min(q.shape[2], self.width)
            parts = [(slice(None), q[:, :, q.shape[2] - new :], positions[:, q.shape[2] - new :], new)]
        else:
            parts = [
                (slice(b, b + 1), q[b : b + 1, :, own], positions[b : b + 1, own], len(own))
                for b in range(q.shape[0])
                for own in [valid[b].nonzero()[:, 0][-self.width :]]
            ]
        fresh, where = self.q.clone(), self.positions.clone()  # new storage: made under inference_mode it is read-only
        for rows, some, at, new in parts:
            if new:
                keep = self.width - new
                fresh[rows, :, :keep], where[rows, :keep] = self.q[rows, :, new:], self.positions[rows, new:]
                fresh[rows, :, keep:], where[rows, keep:] = some, at
        self.q, self.positions = fresh, where
        counts = [q.shape[2]] * q.shape[0] if valid is None else valid.sum(-1).tolist()
        self.counts = [min(self.width, held + new) for held, new in zip(self.counts, counts, strict=True)]

    def reserve(self) -> None:
        """Tensors that `add_step` may write to: what was made under inference_mode is read-only outside."""
        if self.q is not None and self.positions is not None:
            self.q, self.positions = self.q.clone(), self.positions.clone()

    def add_step(self, q: torch.Tensor, positions: torch.Tensor) -> None:
        """`add` of one real token a row, in place: device work alone. `counts` is brought up by `count_steps`."""
        assert self.q is not None
        assert self.positions is not None
        for held, new in ((self.q, q), (self.positions[:, None, :, None], positions[:, None, :, None])):
            held[:, :, :-1] = held[:, :, 1:].clone()
            held[:, :, -1:] = new

    def count_steps(self, new: int) -> None:
        self.counts = [min(self.width, held + new) for held in self.counts]

    def drop_last(self, counts: list[int]) -> None:
        """Forget those of the last counts[b] tokens of row b."""
        for row, count in enumerate(counts):
            self.counts[row] = max(0, self.counts[row] - count)
            if count and self.q is not None and self.positions is not None:
                by = min(count, self.width)
                self.q, self.positions = self.q.clone(), self.positions.clone()
                self.q[row], self.positions[row] = self.q[row].roll(by, 1), self.positions[row].roll(by, 0)

    def select(self, rows: torch.Tensor) -> None:
        self.counts = [self.counts[row] for row in rows.tolist()]
        if self.q is not None and self.positions is not None:
            index = rows.to(self.q.device)
            self.q, self.positions = self.q.index_select(0, index), self.positions.index_select(0, index)

    def move(self, device: torch.device | str) -> None:
        if self.q is not None and self.positions is not None:
            self.q, self.positions = self.q.to(device), self.positions.to(device)

    def last(self, width: int) -> Queries:
        """A copy that remembers fewer."""
        made = Queries(width, [min(width, count) for count in self.counts])
        if self.q is not None and self.positions is not None:
            made.q = self.q[:, :, self.width - width :].clone()
            made.positions = self.positions[:, self.width - width :].clone()
        return made
