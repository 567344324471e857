"""Next-token loss on text that follows a compressed context."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from longwave.decode import StaticDecoder, supports
from longwave.frame import LongCache, cache_argument


@dataclass(frozen=True)
class Scored:
    """What was scored after a context, row by row and token by token.

    losses: nats, [batch, n]. hits: whether the most likely token was the one that came, bool [batch, n]. logprobs:
    [batch, n, vocabulary], None where they were not asked for.
    """

    losses: torch.Tensor
    hits: torch.Tensor
    logprobs: torch.Tensor | None = None

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def divergence(self, dense: "Scored") -> tuple[torch.Tensor, torch.Tensor]:
        """(KL from the dense model in nats, whether the most likely token is the same), both float [batch, n]."""
        if self.logprobs is None or dense.logprobs is None:
            raise ValueError("distributions were not kept: score with keep=True")
        kl = torch.empty_like(self.losses)
        for row, (mine, exact) in enumerate(zip(self.logprobs, dense.logprobs, strict=True)):
            kl[row] = kl_div(mine, exact, log_target=True, reduction="none").sum(-1)
        return kl, (self.logprobs.argmax(-1) == dense.logprobs.argmax(-1)).float()


@torch.no_grad()
def score(
    model: PreTrainedModel, memory: LongCache, ids: torch.Tensor, step: int | None = None, keep: bool = True
) -> Scored:
    """Feed ids [batch, n + 1] after what `memory` holds and score the last n of them.

    step: tokens fed at a time; None feeds all in one pass. Every scored position reads the compressed context: none of
    it comes from the exact pass over the prompt. Single tokens go through a `StaticDecoder` where there is one for the
    model and the cache. keep: whether to keep the distributions, n x vocabulary floats a row.
    """
    ids = ids.to(model.device)
    count = ids.shape[1] - 1
    step = count if step is None else step
    losses, hits, logprobs = [], [], []
    for number, logits in enumerate(_passes(model, memory, ids[:, :count], step)):
        told = logits.float()
        wanted = ids[:, number * step + 1 :][:, : told.shape[1]]
        losses.append(cross_entropy(told.transpose(1, 2), wanted, reduction="none"))
        hits.append(told.argmax(-1) == wanted)
        if keep:
            logprobs.append(log_softmax(told, dim=-1))
    return Scored(torch.cat(losses, dim=1), torch.cat(hits, dim=1), torch.cat(logprobs, dim=1) if keep else None)


def _passes(model: PreTrainedModel, memory: LongCache, ids: torch.Tensor, step: int) -> Iterator[torch.Tensor]:
    """The logits [batch, up to step, vocabulary] of each pass; good until the next one."""
    if step == 1 and memory.get_seq_length() and supports(model, memory) is None:
        with StaticDecoder(model, memory, new_tokens=ids.shape[1]) as decoder:
            for token in ids.T:
                yield decoder.step(token)[:, None]
        return
    for part in ids.split(step, dim=1):
        yield model(part, **cache_argument(model, memory), use_cache=True).logits
