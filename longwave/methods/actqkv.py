"""actqkv: infllm with smaller blocks, chosen by the queries that stand out from what the row asked so far.

Source: ActQKV, arXiv 2502.13542. Of the queries q_i of a stretch, all heads side by side as one vector of features f:

    a_i   = mean over f of (q_if - mean_f)^2 / (variance_f + mean of variance / 100)     of earlier stretches
    probe = sum of a_i q_i / sum of a_i
    worth of a block = cosine of the probe and the block's representatives, one a query head

Mean and variance are running ones of each row and layer. Until `warm` stretches are known all a_i are 1; from then on a
new one counts 1 / warm.

Of our own: the published code has one mean and variance for all layers and prompts, and 1,000 stretches where a row has
`warm` (with 32 layers, about as long). They are of stretches beyond the window alone, since what lies within chooses
nothing, and of such with two queries at least, since one alone is its own probe whatever it weighs: so steps, and
guesses that are taken back, leave nothing behind. A layer reads as many blocks as any other, and the question has no
say of its own: there the steps of a layer whose worths say little are given more blocks, and the first pass adds a
question's vector where the caller tells which tokens ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longwave.checks import whole
from longwave.frame import Pass
from longwave.methods.base import CacheShape
from longwave.methods.infllm import InfLLM, InfLLMBound, InfLLMLayer
from longwave.store.running import Running
from longwave.store.state import State, under, within


@dataclass(frozen=True)
class ActQKV(InfLLM):
    """infllm in small blocks, which are chosen by the queries that stand out from what was asked before (ActQKV).

    sinks, window, block, blocks, representatives, chunk, cached, host: as in infllm. warm: stretches of a prompt until
        queries weigh otherwise than alike, and that are averaged over.

    It takes no budget, since all is held; 1 reads all.
    """

    name: ClassVar[str] = "actqkv"

    sinks: int = 64
    window: int = 512
    block: int = 32
    blocks: int = 46
    chunk: int = 256
    cached: int = 128
    warm: int = 32

    def __post_init__(self) -> None:
        whole("warm", self.warm, 1, "stretches")
        super().__post_init__()

    def bound(self, shape: CacheShape, budget: float | None) -> ActQKVBound:
        return ActQKVBound(self, shape, budget)

    def worth(self, layer: InfLLMLayer, q: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
        """Cosines, by the published formula."""
        assert isinstance(layer, ActQKVLayer)
        assert layer.means is not None
        wide = wider(q.dtype)
        means, kv_heads = layer.means.to(wide), layer.means.shape[1]
        weight = layer.weights(q, asks)
        probe = (q.to(wide) * weight[:, None, :, None]).sum(2)
        product = torch.einsum("bhd,bhnd->bn", probe.unflatten(1, (kv_heads, -1)).sum(2), means)
        norm = means.square().sum((1, 3)) * (q.shape[1] // kv_heads) * probe.square().sum((1, 2))[:, None]
        return product / norm.sqrt().clamp(min=torch.finfo(wide).eps)


@dataclass(frozen=True, eq=False)
class ActQKVBound(InfLLMBound):
    method: ActQKV

    def reading(self, index: int) -> ActQKVLayer:
        return ActQKVLayer(index, self)

    @property
    def features(self) -> int:
        return self.shape.query_heads * self.shape.head_dim

    def beside(self, tokens: int) -> int:
        return super().beside(tokens) + Running.nbytes(self.features, wider(self.shape.dtype).itemsize)


class ActQKVLayer(InfLLMLayer):
    """And a memory of what its rows asked."""

    method: ActQKV
    bound: ActQKVBound
    asked: Running | None  # what its rows asked so far, on average

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.asked = self._nothing()

    def _nothing(self) -> Running:
        m, features = self.method, self.bound.features
        return Running(self.batch_size, features, m.warm, m.plain, wider(self.dtype), self.device)

    def _clear(self) -> None:
        super()._clear()
        self.asked = None

    def weights(self, q: torch.Tensor, asks: torch.Tensor) -> torch.Tensor:
        """What each query weighs, of q as `worth` has it: [batch, queries], of a row 1 together, 0 where none asks."""
        if q.shape[2] == 1:  # a captured step reads nothing that a later pass puts elsewhere
            return asks.to(wider(q.dtype))
        assert self.asked is not None
        mean, variance = (x[:, None] for x in (self.asked.mean, self.asked.variance))
        least = torch.finfo(mean.dtype).eps
        off = (_features(q) - mean).square()
        bias = (off / (variance + variance.mean(-1, keepdim=True) / 100).clamp(min=least)).mean(-1) + least
        warm = self.asked.lessons[:, :1] >= self.method.warm
        weight = torch.where(warm, bias, torch.ones_like(bias)) * asks
        return weight / weight.sum(-1, keepdim=True).clamp(min=least)

    def read(
        self,
        p: Pass,
        number: torch.Tensor,
        stop: torch.Tensor,
        longest: int,
        asks: torch.Tensor | None = None,
        square: bool = False,
    ) -> torch.Tensor:
        out = super().read(p, number, stop, longest, asks, square)
        if asks is not None and number.shape[1] > 1 and longest > self.method.plain:
            assert self.asked is not None
            far = torch.full_like(number, self.method.window - 1)
            q = p.rotary.shift(p.module, p.q, p.known_positions(), far)
            self.asked.learn(_features(q), asks, stop)
        return out

    def can_drop(self, counts: list[int]) -> None:
        super().can_drop(counts)
        left = [held - count for held, count in zip(self.dense.lengths, counts, strict=True)]
        for row, remembered in enumerate([] if self.asked is None else self.asked.remembers(left)):
            if not remembered:
                raise ValueError(
                    f"cannot remove the last {counts[row]} tokens: what row {row} asked there is averaged with what it "
                    "asked before, which is remembered for its last two stretches alone. Keep a copy.deepcopy of the "
                    "cache to go back to"
                )

    def drop_last(self, counts: list[int]) -> None:
        super().drop_last(counts)
        if self.asked is not None:
            self.asked.back(self.dense.lengths)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        if self.asked is not None:
            self.asked.select(rows)

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        if self.asked is not None:
            self.asked.move(device)

    def parts(self) -> dict[str, list[torch.Tensor]]:
        return super().parts() | ({} if self.asked is None else {"asked": self.asked.tensors()})

    def state(self) -> State:
        made = super().state()
        return made if self.asked is None else {**made, **under("asked", self.asked.state())}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load_state(state, device)
        if state:
            self.asked = self._nothing()
            self.asked.load_state(within("asked", state))


def wider(dtype: torch.dtype) -> torch.dtype:
    """In which is reckoned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _features(q: torch.Tensor) -> torch.Tensor:
    """All heads of a query side by side: [batch, query_heads, queries, head_dim] -> [batch, queries, features]."""
    return q.transpose(1, 2).flatten(2).to(wider(q.dtype))
