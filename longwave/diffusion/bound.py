"""What a masked-diffusion model expects of a text: an upper bound of its loss, over random masks."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from longwave.checks import whole
from longwave.diffusion.generate import mask_of, real_tokens
from longwave.diffusion.noise import Draws
from longwave.diffusion.reading import Reader


@torch.no_grad()
def loss_bound(
    model: PreTrainedModel,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scored: int,
    samples: int = 8,
    seed: int = 0,
) -> torch.Tensor:
    """Nats a token of the last `scored` tokens of ids int64 [batch, tokens], after those before them: float64 [batch].

    k of 1 .. scored, each as likely, of these tokens are masked, any k alike, and those are what the loss is the mean
    over: its expectation is at least the text's own loss (LLaDA, arXiv 2502.09992;
    exp of it bounds perplexity). This is the mean of `samples` passes whose k lie evenly, by one random start a row;
    row b draws by seed + b, so rows do not depend on each other. attention_mask: 0 for padding, on the left.
    ValueError for a causal model and for what does not fit.
    """
    mask_id = mask_of(model)
    real = real_tokens(ids, attention_mask, mask_id).to(model.device)
    whole("scored", scored, 1, "tokens")
    whole("samples", samples, 1, "passes")
    whole("seed", seed, None)
    if int(real.sum(-1).min()) <= scored:
        raise ValueError(
            f"{scored} tokens are scored after at least one other, and a row has {int(real.sum(-1).min())}"
        )
    ids, tokens = ids.to(model.device), ids.shape[1]
    start = tokens - scored
    reader = Reader(model, real, bool(getattr(model.config.get_text_config(), "logit_shift", False)), None, "prefix")
    draws = [Draws(seed + row, model.device) for row in range(len(ids))]
    starts = torch.cat([each.uniform(1) for each in draws])
    total = torch.zeros(len(ids), dtype=torch.float64, device=model.device)
    for sample in range(samples):
        masked = 1 + (scored * ((starts + sample / samples) % 1)).long()  # [batch]
        rank = torch.stack([each.uniform(scored).argsort().argsort() for each in draws])
        hidden = rank < masked[:, None]
        text = ids.clone()
        text[:, start:].masked_fill_(hidden, mask_id)
        logits = reader.plain(text, start, tokens)
        loss = cross_entropy(logits.double().flatten(0, 1), ids[:, start:].flatten(), reduction="none")
        total += (loss.view_as(hidden) * hidden).sum(-1) / masked
    return total / samples
