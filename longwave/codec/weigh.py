"""What noise on K and V costs the model's output: the Fisher information of every channel of the cache.

F_cc = mean over tokens, probes and windows of the squared gradient of sum_s sqrt(w_s) log p(y_s) at K (turned back,
like the K that is coded) or V of a cached token, y_s drawn from the model's own p, w the weights of the scored tokens
(a window's sum to 1). Independent noise of variance v on channel c of T tokens then costs T F_cc v / 2 nats a scored
token, so after multiplying channels by sqrt(F_cc) noise costs the same wherever it lies: one quantiser step serves all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longwave.codec.rotation import Rotation
from longwave.frame import LongCache, Needs, assemble, cache_argument
from longwave.plan.probe import UNREACHED, ContextAttention, NoGradients, Watched, drawn, frozen, slopes
from longwave.plan.recall import Windows

FLOOR = 1e-3  # of a head's mean, the least a channel weighs: the weights are divided by when a segment is decoded


class Open(Watched):
    """A dense layer whose stored tokens have gradients in a pass with gradients, which does not enter it."""

    leaves: tuple[Tensor, Tensor]  # K as cached and V of the context, [B, H, T, D] each

    def forward(
        self,
        q: Tensor,
        scaling: float,
        mask: Any = None,
        module: Any = None,
        positions: Any = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(q, scaling, mask, module, positions, sinks)
        k, v = (x.detach().requires_grad_() for x in self.dense.view())
        self.leaves = k, v
        return ContextAttention.apply(q, *self.own, k, v, scaling, None if sinks is None else sinks.detach())


def read(model: PreTrainedModel, ids: Tensor) -> LongCache:
    """A cache of `Open` layers that has read ids int64 [rows, tokens], exactly."""
    memory = assemble(model, lambda index: Open(index), Needs(), "dense")
    with torch.no_grad():
        model(ids.to(model.device), **cache_argument(model, memory), use_cache=True, logits_to_keep=1)
    return memory


def gradients(
    model: PreTrainedModel, memory: LongCache, windows: Windows, probes: int, first: int = 0
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Of every probe, the gradients at each memory layer's K (as cached) and V, float32 [B, H, T, D] each.

    memory: what `read` has made of the windows' context; it stays as it is. first: number of the first window, which
    decides what is drawn. Raises NoGradients where none come through.
    """
    layers: list[Open] = list(memory.memory_layers())  # type: ignore[arg-type]
    ids, found = windows.ids.to(model.device), []
    with torch.enable_grad(), frozen(model):
        logits = model(ids[:, windows.context : -1], **cache_argument(model, memory), use_cache=True).logits
        if not logits.requires_grad:
            raise NoGradients(UNREACHED)
        logp = logits[(windows.weight > 0).to(logits.device)].float().log_softmax(-1)
        del logits
        leaves = [x for layer in layers for x in layer.leaves]
        for grads, scale in slopes(drawn(logp, windows, probes, first), leaves):
            found.append(([g.float() / scale for g in grads[::2]], [g.float() / scale for g in grads[1::2]]))
    for layer in layers:
        del layer.leaves
    return found


class Fisher:
    """F_cc summed over windows and probes: K's and V's, float64 [L, H, D], of the tokens in `coded`."""

    def __init__(self, rotation: Rotation, coded: slice):
        self.rotation, self.coded = rotation, coded
        self.sums: list[Tensor] | None = None
        self.count = 0

    def add(self, k: list[Tensor], v: list[Tensor]) -> None:
        """The gradients of one probe: a tensor a layer, [B, H, T, D] each."""
        positions = torch.arange(k[0].shape[2])[self.coded].to(k[0].device)
        for row in range(len(k[0])):
            pair = [torch.stack([x[row, :, self.coded].transpose(0, 1) for x in side]) for side in (k, v)]
            pair[0] = self.rotation.to(k[0].device).gradient(pair[0], positions)
            new = [x.double().square().sum(1).cpu() for x in pair]  # [L, n, H, D]
            self.sums = new if self.sums is None else [a + b for a, b in zip(self.sums, new, strict=True)]
            self.count += len(positions)

    def weights(self) -> tuple[Tensor, Tensor]:
        """sqrt(F_cc) of K and V, float64 [L, H, D], no less than FLOOR of its head's mean F and of all of them."""
        if self.sums is None or not all(bool(torch.isfinite(x).all()) for x in self.sums):
            raise NoGradients("the gradients at this model's cache are not finite: load it in bfloat16 or float32")
        every = torch.cat([x.flatten() for x in self.sums]).mean()
        if not every > 0:
            raise NoGradients(UNREACHED)
        found = []
        for x in self.sums:
            least = FLOOR * torch.maximum(x.mean(-1, keepdim=True), FLOOR * every)
            found.append((torch.maximum(x, least) / self.count).sqrt())
        return found[0], found[1]
