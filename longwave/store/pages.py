"""Compressed segments as fixed-size pages (ops/spectral/layout.py).

A page is made once from dense values and never touched again, so the order in which tokens arrived cannot matter.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longwave.ops.kernels import choice, on_device, wants_triton
from longwave.ops.spectral import cpu, reference
from longwave.ops.spectral.basis import table
from longwave.ops.spectral.layout import Layout
from longwave.store.state import State, demand
from longwave.store.tokens import writable

_LOGGED: set[str] = set()  # what answers is said once a process
EXPAND = 64  # query rows (group x queries) a KV head from which on pages are unpacked once, and SDPA answers


class PageStore:
    """The middle of a batch: pages uint8 [batch, segments, page bytes]; row b fills its first `counts[b]` pages."""

    def __init__(self, batch: int, layout: Layout, basis: str, states: int, device: torch.device):
        self.layout, self.basis, self.states = layout.on(device), basis, states
        self.counts = [0] * batch
        self.pages = torch.zeros(batch, 0, layout.page_bytes, dtype=torch.uint8, device=device)
        self._ends: torch.Tensor | None = None  # `counts` where the GPU kernel reads them
        self._answered: dict[str, None] = {}  # what has attended over these pages, in order

    @property
    def room(self) -> int:
        """Tokens that `scores` speaks of: there is room for them, whether a row has them or not."""
        return self.pages.shape[1] * self.layout.segment

    @property
    def tokens(self) -> list[int]:
        """Middle tokens held, per row."""
        return [count * self.layout.segment for count in self.counts]

    def answers(self) -> list[str]:
        """What has attended over these pages so far, and where that is plain torch, why."""
        return list(self._answered)

    def _answer(self, who: str) -> None:
        if who not in self._answered:
            self._answered[who] = None
            if who not in _LOGGED:
                _LOGGED.add(who)
                logging.getLogger("longwave").info("attention over pages is answered by %s", who)

    def expands(self, q: torch.Tensor) -> bool:
        """Whether q [B, Hq, Q, D] is better answered by `expand` and dense attention."""
        return q.shape[1] // self.layout.heads * q.shape[2] > EXPAND

    def due(self, row: int, waiting: int) -> int:
        """How many of `waiting` tokens behind the window would be compressed now."""
        return waiting // self.layout.segment * self.layout.segment

    def _table(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        return table(self.basis, self.states, self.layout.segment, kind, device)

    def append(self, row: int | None, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Compress tokens [b, H, m * segment, D] of one row (b = 1), or of all rows at once (row is None).

        bias [b, H, m]: of merged heads, all of whose tokens have the segment's merged K and V; None: 0.
        """
        fresh = self._encode(k, v)
        if bias is not None:
            reference.write_bias(self.layout, fresh, bias)
        new = fresh.shape[1]
        if row is None and set(self.counts) == {self.pages.shape[1]}:
            self.pages = torch.cat([self.pages, fresh], dim=1)
        else:
            rows = range(len(self.counts)) if row is None else [row]
            need = max(self.counts[r] + new for r in rows)
            held = self.pages if writable(self.pages) else self.pages.clone()
            if held.shape[1] < need:
                held = torch.cat([held, held.new_zeros(held.shape[0], need - held.shape[1], held.shape[2])], dim=1)
            for i, r in enumerate(rows):
                held[r, self.counts[r] : self.counts[r] + new] = fresh[i]
            self.pages = held
        if row is None:
            self.counts = [count + new for count in self.counts]
        else:
            self.counts[row] += new
        self._ends = None

    def _encode(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Pages of K and V, in Triton where that answers."""
        rows = self._table(k.dtype, k.device)
        kernels = self._triton("triton_encode", "kernels cannot compress", k.device)
        if kernels is None:
            return reference.encode(self.layout, k, v, rows)
        with on_device(k.device):
            return kernels.encode(self.layout.tables["triton_encode"], k, v, rows)

    def _triton(self, name: str, cannot: str, device: torch.device, rows: int = 0) -> Any:
        """The module ops/spectral/`name`, with its `Layout.tables`; None where the reference answers.

        rows: query rows a KV head; a block of a prompt has too many: it is made of products that torch does well.
        """
        if not wants_triton(device):
            return None
        try:
            module = importlib.import_module(f"longwave.ops.spectral.{name}")
        except ImportError:
            self.layout.tables[name] = "Triton is not installed"
        else:
            if rows and rows > module.ROWS:
                return None
            if name not in self.layout.tables:
                self.layout.tables[name] = module.fits(self.layout) or module.tables_of(self.layout)
        if not isinstance(self.layout.tables[name], str):
            return module
        if choice() == "triton":
            raise RuntimeError(f"LONGWAVE_KERNELS=triton, but the {cannot}: {self.layout.tables[name]}")
        return None

    def reserve(self, segments: int) -> None:
        """Room for `segments` pages a row, in a tensor that `append` fills in place until `release`."""
        batch, held, size = self.pages.shape
        room = self.pages.new_zeros(batch, max(segments, held), size)
        room[:, :held] = self.pages
        self.pages = room

    def release(self) -> None:
        """Back to as many pages as the longest row has."""
        self.pages = self.pages[:, : max(self.counts)].clone()

    def attend(
        self,
        q: torch.Tensor,
        scaling: float,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: torch.Tensor | None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Attention over pages and dense tokens in one pass, or None where the Triton kernel does not answer.

        q [B, Hq, Q, D]; k, v [B, H, L, D] dense, of which query i of row b sees the first visible[b, i] (None: all).
        counts int32 [B] on q's device: pages of each row where `self.counts` may lag behind.
        """
        rows = q.shape[1] // self.layout.heads * q.shape[2]
        fused = self._triton("triton", "kernel cannot be used", q.device, rows)
        if fused is None:
            return None
        self._answer("the Triton kernel")
        if counts is None:
            if self._ends is None:
                self._ends = torch.tensor(self.counts, dtype=torch.int32, device=q.device)
            counts = self._ends
        if visible is None:
            seen = torch.full((q.shape[0], q.shape[2]), k.shape[2], dtype=torch.int32, device=q.device)
        else:
            seen = visible.to(q.device, torch.int32).expand(q.shape[0], q.shape[2]).contiguous()
        basis = self._table(q.dtype, q.device)
        with on_device(q.device):
            return fused.attend(self.layout.tables["triton"], self.pages, counts, basis, q, scaling, k, v, seen)

    def _kernel(self, usable: bool) -> cpu.Tables | None:
        """The CPU kernel's tables, where it is usable and may answer."""
        if choice() == "reference" or not usable:
            return None
        if "cpu" not in self.layout.tables:
            self.layout.tables["cpu"] = cpu.tables_of(self.layout)
        return self.layout.tables["cpu"]

    def _who(self, tables: Any, q: torch.Tensor) -> str:
        """What `scores` and `mix` are computed by."""
        if tables is not None:
            return "the numba kernel"
        if choice() == "reference":
            return "plain torch (LONGWAVE_KERNELS=reference)"
        why = self.layout.tables.get("triton") if q.device.type == "cuda" else cpu.why_not(self.layout, q)
        return f"plain torch ({why})" if isinstance(why, str) else "plain torch"

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """q [B, H, R, D] -> unscaled scores [B, H, R, M], M the longest row's middle."""
        rows, tables = self._table(q.dtype, q.device), self._kernel(cpu.usable(self.layout, q))
        self._answer(self._who(tables, q))
        if tables is not None:
            return cpu.scores(tables, self.pages, q, rows)
        return reference.scores(self.layout, self.pages, q, rows)

    def mix(self, p: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, H, R, M] -> their share of the output [B, H, R, D]."""
        rows, tables = self._table(p.dtype, p.device), self._kernel(cpu.usable(self.layout, p))
        if tables is not None:
            return cpu.mix(tables, self.pages, p, rows)
        return reference.mix(self.layout, self.pages, p, rows)

    def expand(self, row: int, out_k: torch.Tensor, out_v: torch.Tensor) -> None:
        """Write the K and V that a row's pages stand for into out_k and out_v [1, H, tokens[row], D]."""
        pages, rows = self.pages[row : row + 1, : self.counts[row]], self._table(out_k.dtype, out_k.device)
        kernels = self._triton("triton_expand", "kernels cannot unpack", out_k.device)
        if kernels is not None:
            who = "the Triton kernel"
            with on_device(out_k.device):
                kernels.expand(self.layout.tables["triton_expand"], pages, rows, out_k, out_v)
        elif (tables := self._kernel(cpu.can_expand(self.layout, out_k))) is not None:
            who = "the numba kernel"
            cpu.expand(tables, pages, rows, out_k, out_v)
        else:
            who = "plain torch"
            reference.expand(self.layout, pages, rows, out_k, out_v)
        self._answer(f"SDPA over what {who} unpacked")

    def bias(self, row: int) -> torch.Tensor:
        """float32 [1, H, pages]: what is added to the scores of each page of a row."""
        return reference.read_bias(self.layout, self.pages[row : row + 1, : self.counts[row]])

    def materialize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The K and V that the store stands for: [B, H, M, D] each. What attention adds to scores is `bias`."""
        k, v = reference.decode(self.layout, self.pages, self._table(self.layout.dtype, self.pages.device))
        return k.to(self.layout.dtype), v.to(self.layout.dtype)

    def span(self, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`materialize` of a row's middle tokens start to stop: [H, stop - start, D] each."""
        size = self.layout.segment
        first = start // size
        pages = self.pages[row : row + 1, first : -(-stop // size)]
        k, v = reference.decode(self.layout, pages, self._table(self.layout.dtype, pages.device))
        own = slice(start - first * size, stop - first * size)
        return k[0, :, own].to(self.layout.dtype), v[0, :, own].to(self.layout.dtype)

    def keys(self, row: int, start: int, stop: int) -> torch.Tensor:
        """K alone of a row's middle tokens start to stop: [H, stop - start, D]."""
        size = self.layout.segment
        first = start // size
        pages = self.pages[row : row + 1, first : -(-stop // size)]
        k = reference.decode_side(self.layout, self.layout.k, pages, self._table(self.layout.dtype, pages.device))
        return k[0, :, start - first * size : stop - first * size].to(self.layout.dtype)

    def taken(self, row: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a row's middle tokens index [n]: [H, n, D] each. Only their pages are opened."""
        wanted, where = (index // self.layout.segment).unique(return_inverse=True)
        pages = self.pages[row : row + 1, wanted]
        at = where * self.layout.segment + index % self.layout.segment
        k, v = reference.decode(self.layout, pages, self._table(self.layout.dtype, pages.device))
        return k[0, :, at].to(self.layout.dtype), v[0, :, at].to(self.layout.dtype)

    def state(self) -> State:
        """Everything held, not copied. What names the channels follows from the layout."""
        return {"pages": self.pages, "counts": list(self.counts)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave, on the device where it lies. ValueError for pages of another layout."""
        pages, counts = state["pages"], list(state["counts"])
        shape = [len(self.counts), self.layout.page_bytes]
        fits = pages.ndim == 3 and shape == [pages.shape[0], pages.shape[2]] and pages.dtype == torch.uint8
        demand(fits, f"pages are {list(pages.shape)} of {pages.dtype}, not [{shape[0]}, .., {shape[1]}] of uint8")
        demand(len(counts) == shape[0] and min(counts) >= 0 and max(counts) <= pages.shape[1], f"counts are {counts}")
        self.pages, self.counts = pages, counts
        self.move(pages.device)

    def index(self) -> Iterator[torch.Tensor]:
        for group in (*self.layout.k, *self.layout.v):
            yield from (group.heads, group.order)

    def parts(self) -> dict[str, list[torch.Tensor]]:
        return {"pages": [self.pages]}

    def move(self, device: torch.device | str) -> None:
        self.pages = self.pages.to(device)
        self.layout, self._ends = self.layout.on(self.pages.device), None

    def select(self, rows: torch.Tensor) -> None:
        self.counts = [self.counts[row] for row in rows.tolist()]
        self._ends = None
        self.pages = self.pages.index_select(0, rows.to(self.pages.device))[:, : max(self.counts)].clone()
