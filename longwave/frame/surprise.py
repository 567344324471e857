"""How little a model expected each token, where a method asks for it: minus the log of the probability that it gave it.

This is known behind the last layer of a pass, so layers that ask for it settle there. It comes from what goes into the
model's head, not from the logits that a caller asks for: `generate` takes the last ones of a prompt alone. Hooks on the
model last as long as the cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.frame.hooks import Hooks
from longwave.frame.ids import given
from longwave.frame.observe import Needs, Queries

LOGITS = 1 << 24  # held at once


class Listener(Hooks):
    """Hooks around a model's layers."""

    def __init__(self, model: PreTrainedModel):
        head, base = model.get_output_embeddings(), model.get_decoder()
        if head is None or base is None or base is model:
            raise NotImplementedError(
                f"{type(model).__name__} has no head, and this method judges tokens by its logits: load the model with "
                "one, as AutoModelForCausalLM or longwave.load do"
            )
        config = model.config.get_text_config(decoder=True)
        hooks = [
            base.register_forward_pre_hook(_before, with_kwargs=True),
            base.register_forward_hook(partial(_after, head, config), with_kwargs=True),
        ]
        super().__init__(hooks)


def _asks(needs: Needs) -> bool:
    return needs.surprise > 0


@torch.compiler.disable
def _before(module: Any, args: Any, kwargs: Any) -> None:
    cache, ids = given(module, args, kwargs, _asks)
    if cache is None:
        return
    if ids is None:
        raise ValueError(
            f"{cache.method} judges tokens by how little they were expected, and {type(module).__name__} was given "
            "embeddings: pass input_ids, to a model of text alone (one that reads images makes embeddings of them)"
        )
    cache._progress.ids = ids


@torch.compiler.disable
def _after(head: Any, config: Any, module: Any, args: Any, kwargs: Any, output: Any) -> None:
    cache, _ = given(module, args, kwargs, _asks)
    if cache is None or cache._progress.ids is None:  # another cache's hooks, of the same model, came first
        return
    ids, cache._progress.ids = cache._progress.ids, None
    first = next(cache.memory_layers())
    hidden = getattr(output, "last_hidden_state", None)
    try:
        with torch.no_grad():
            hidden = (output[0] if hidden is None else hidden).detach().to(first.dtype)
            found = surprises(head, config, hidden, ids, first._valid, first.heard)
            first.remember(hidden)
            for layer in cache.memory_layers():
                if layer.needs.surprise:
                    layer.hear(found)
    except BaseException:
        cache._progress.broken = True
        raise
    cache._progress.unheard = False


def surprises(
    head: Any, config: Any, hidden: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor | None, heard: Queries | None
) -> list[torch.Tensor]:
    """Minus log p of each row's real tokens, float32 [their number]: what went into the head one token before, hidden
    [batch, tokens, hidden_size], `heard` before the pass, says what was expected.

    The first token of a row, which nothing came before, has the most of the pass.
    """
    before, after, opens = [], [], []
    for row in range(ids.shape[0]):
        own = slice(None) if valid is None else valid[row]
        states, tokens = hidden[row, own], ids[row, own].to(hidden.device)
        known = heard is not None and heard.q is not None and heard.counts[row] > 0
        opens.append(len(tokens) > 0 and not known)
        last = heard.q[row, :, -1] if known else states[:0]  # type: ignore[union-attr, index]
        before.append(torch.cat([last.to(states.dtype), states])[: len(tokens) - opens[-1]])
        after.append(tokens[1:] if opens[-1] else tokens)
    flat = _minus_log(head, config, torch.cat(before), torch.cat(after))
    found = flat.split([len(tokens) for tokens in after])
    return [
        torch.cat([own.max()[None] if len(own) else own.new_zeros(1), own]) if first else own
        for own, first in zip(found, opens, strict=True)
    ]


def _minus_log(head: Any, config: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Minus log p of ids [n] by hidden [n, hidden_size]: float32 [n]."""
    found = torch.zeros(len(ids), dtype=torch.float32, device=hidden.device)
    step = max(1, LOGITS // config.vocab_size)
    for start in range(0, len(ids), step):
        logits = _as_configured(head(hidden[start : start + step]), config).float()
        said = logits.gather(-1, ids[start : start + step, None])[:, 0]
        found[start : start + step] = logits.logsumexp(-1) - said
    return found


def _as_configured(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What models do to their logits by config: Cohere, Granite, Gemma."""
    logits = logits * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits
