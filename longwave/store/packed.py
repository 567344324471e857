"""Tokens whose keys keep some of their channels, packed: other ones in every row and head, the same for all of its
tokens. Values are whole.

A query meets the packed keys with its own kept channels: the scores are those of keys with zeros in the other ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longwave.store.pages import EXPAND
from longwave.store.state import State, demand, under, within
from longwave.store.tokens import TokenBuffer


class PackedStore:
    """The middle of a batch: K [batch, kv_heads, tokens, kept] and V [.., head_dim], in whole segments. Answers to what
    `PageStore` does.

    channels int16 [batch, kv_heads, kept]: which they are, rising, once `decide` has said so of a row.
    """

    def __init__(
        self, batch: int, heads: int, kept: int, dim: int, segment: int, dtype: torch.dtype, device: torch.device
    ):
        self.heads, self.kept, self.dim, self.segment, self.dtype = heads, kept, dim, segment, dtype
        self.held = TokenBuffer(batch)
        self.channels = torch.zeros(batch, heads, kept, dtype=torch.int16, device=device)
        self.decided = [False] * batch

    @property
    def tokens(self) -> list[int]:
        """Middle tokens held, per row."""
        return list(self.held.lengths)

    @property
    def counts(self) -> list[int]:
        """Segments held, per row."""
        return [n // self.segment for n in self.held.lengths]

    @property
    def room(self) -> int:
        """Tokens that `scores` speaks of: those of the longest row, or as many as are reserved."""
        return self.held.k.shape[2] if self.held.fixed and self.held.k is not None else self.held.longest

    def answers(self) -> list[str]:
        return ["plain torch (packed keys have no kernel)"]

    def due(self, row: int, waiting: int) -> int:
        """How many of `waiting` tokens behind the window would be packed now."""
        return waiting // self.segment * self.segment

    def decide(self, row: int, energy: torch.Tensor) -> None:
        """From now on a row keeps the channels of most energy [kv_heads, head_dim], the earlier one of equals."""
        best = energy.argsort(dim=-1, descending=True, stable=True)[:, : self.kept]
        if not self.held.fixed:
            self.channels = self.channels.clone()  # what inference_mode made is read-only outside
        self.channels[row] = best.sort(-1).values.to(torch.int16)
        self.decided[row] = True

    def append(self, row: int | None, k: torch.Tensor, v: torch.Tensor) -> None:
        """Pack tokens [b, H, m * segment, D] of one row (b = 1), or of all rows at once (row is None)."""
        rows = slice(None) if row is None else slice(row, row + 1)
        packed = k.gather(-1, self._index(rows, k.shape[2]))
        if row is None:
            self.held.append(packed, v, None)
        else:
            own = torch.arange(len(self.decided), device=k.device)[:, None] == row
            batch = (len(self.decided), -1, -1, -1)
            self.held.append(packed.expand(batch), v.expand(batch), own.expand(-1, k.shape[2]))
        self.held.fit()

    def _index(self, rows: slice, n: int) -> torch.Tensor:
        """The channels of some rows for n tokens or queries: int64 [rows, kv_heads, n, kept], not copied."""
        return self.channels[rows, :, None].long().expand(-1, -1, n, -1)

    # attention

    def expands(self, q: torch.Tensor) -> bool:
        """Whether q [B, Hq, Q, D] is better answered by `expand` and dense attention."""
        return q.shape[1] // self.heads * q.shape[2] > EXPAND

    def attend(self, *args: object) -> None:
        """No kernel knows packed keys."""

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, H, R, D] -> unscaled scores [B, H, R, room]; columns after a row's end are zero."""
        assert self.held.k is not None
        own = q.gather(-1, self._index(slice(None), q.shape[2]))
        return own @ self.held.k[:, :, : self.room].to(q.dtype).mT

    def mix(self, p: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, H, R, room] -> their share of the output [B, H, R, D]."""
        assert self.held.v is not None
        return p @ self.held.v[:, :, : self.room].to(p.dtype)

    def expand(self, row: int, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
        """Write the K, with zeros in channels that are gone, and V of a row into out_k and out_v [1, H, tokens, D]."""
        assert self.held.k is not None
        assert self.held.v is not None
        n, rows = self.held.lengths[row], slice(row, row + 1)
        out_k.zero_().scatter_(-1, self._index(rows, n), self.held.k[rows, :, :n].to(out_k.dtype))
        out_v.copy_(self.held.v[rows, :, :n])

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The K, zeros in channels that are gone, and V: [B, H, longest, D] each."""
        k, v = self.held.view()
        whole = k.new_zeros(*k.shape[:3], self.dim)
        return whole.scatter_(-1, self._index(slice(None), k.shape[2]), k), v.clone()

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`materialize` of a row's middle tokens start to stop: [H, stop - start, D] each."""
        k, v = self.held.view()
        whole = k.new_zeros(self.heads, stop - start, self.dim)
        whole.scatter_(-1, self._index(slice(row, row + 1), stop - start)[0], k[row, :, start:stop])
        return whole, v[row, :, start:stop]

    # storage

    def reserve(self, segments: int) -> None:
        """Room for so many segments a row, in tensors that `append` fills in place until `release`."""
        if self.held.k is None:
            shape, device = (len(self.decided), self.heads, 0), self.channels.device
            none = [torch.zeros(*shape, n, dtype=self.dtype, device=device) for n in (self.kept, self.dim)]
            self.held.append(none[0], none[1], None)
        self.held.reserve(segments * self.segment)
        self.channels = self.channels.clone()  # a step reads it, and `decide` writes to it

    def release(self) -> None:
        """Back to as many tokens as the longest row has."""
        self.held.release()

    def parts(self) -> dict[str, list[torch.Tensor]]:
        return {"packed": list(self.held.tensors())}

    def index(self) -> Iterator[torch.Tensor]:
        yield self.channels

    def move(self, device: torch.device | str) -> None:
        self.held.move(device)
        self.channels = self.channels.to(device)

    def select(self, rows: torch.Tensor) -> None:
        self.held.select(rows)
        self.channels = self.channels.index_select(0, rows.to(self.channels.device))
        self.decided = [self.decided[row] for row in rows.tolist()]

    def state(self) -> State:
        """Everything held, not copied."""
        return {"channels": self.channels, "decided": list(self.decided), **under("held", self.held.state())}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave. ValueError where it does not fit together."""
        self.held.load_state(within("held", state))
        channels, decided = state["channels"], list(state["decided"])
        fits = channels.shape == self.channels.shape and channels.dtype == torch.int16
        demand(fits, f"channels are {list(channels.shape)} of {channels.dtype}")
        wrong = "channels are rising numbers of a head's"
        demand(bool(((channels >= 0) & (channels < self.dim)).all()), wrong)
        demand(len(decided) == len(self.decided), f"{len(decided)} rows of {len(self.decided)} are decided")
        rising = (channels.diff(dim=-1) > 0).all(-1).all(-1).tolist()
        demand(all(up or not made for up, made in zip(rising, decided, strict=True)), wrong)
        demand(
            all(made or not n for made, n in zip(decided, self.held.lengths, strict=True)),
            "tokens are packed of a row whose channels nobody has chosen",
        )
        if self.held.k is not None and self.held.v is not None:
            shapes = [[x.shape[1], x.shape[3]] for x in self.held.tensors()]
            demand(shapes == [[self.heads, self.kept], [self.heads, self.dim]], f"packed K and V are {shapes}")
            demand(self.held.k.dtype == self.held.v.dtype == self.dtype, f"packed K is {self.held.k.dtype}")
        demand(all(n % self.segment == 0 for n in self.held.lengths), f"segments are of {self.segment} tokens")
        self.channels, self.decided = channels, decided
