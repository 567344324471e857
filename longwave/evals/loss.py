"""Next-token loss on text that follows a compressed context."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from longwave.cache import LongCache


@dataclass(frozen=True)
class Scored:
    """log-probabilities [tokens, vocabulary] after each scored token, and the mean loss in nats."""

    logprobs: torch.Tensor
    loss: float

    def divergence(self, dense: "Scored") -> tuple[float, float]:
        """(mean KL from the dense model in nats, share of positions with the same most likely token)."""
        kl = kl_div(self.logprobs, dense.logprobs, log_target=True, reduction="none").sum(-1).mean()
        same = (self.logprobs.argmax(-1) == dense.logprobs.argmax(-1)).float().mean()
        return float(kl), float(same)


@torch.no_grad()
def score(model: PreTrainedModel, memory: LongCache, ids: torch.Tensor) -> Scored:
    """Feed ids [1, n + 1] after what `memory` holds, in one pass, and score the last n of them.

    Every scored position reads the compressed context: none of it comes from the exact pass over the prompt.
    """
    ids = ids.to(model.device)
    logits = model(ids[:, :-1], past_key_values=memory, use_cache=True).logits[0].float()
    return Scored(log_softmax(logits, dim=-1), float(cross_entropy(logits, ids[0, 1:])))
