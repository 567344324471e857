"""What a draft model writes after a prompt, row by row the most likely tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from longwave.frame.argument import cache_argument


def checked_mask(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mask of a prompt ids int64 [batch, tokens], ones where there is none. ValueError where it is not one of
    prompts that all end in the last column."""
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"a prompt is token ids [batch, tokens], got {list(ids.shape)} of {ids.dtype}")
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(
            f"the attention mask is {list(mask.shape)} and the prompt {list(ids.shape)}: a draft reads all of the "
            "text, so give all ids and the mask over them"
        )
    if not bool(mask[:, -1].all()):
        raise ValueError("a draft writes on from the last column, and some rows end in padding: pad on the left")
    return mask.to(ids.device)


def placed(mask: torch.Tensor, new: int) -> dict[str, torch.Tensor]:
    """What a model is told of the last `new` columns of a mask: nothing where no row is padded."""
    if bool(mask.all()):
        return {}
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]}


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model knows."""
    table: Any = model.get_input_embeddings()
    return table.weight.shape[0]


@torch.no_grad()
def write_on(
    draft: PreTrainedModel, memory: Cache, ids: torch.Tensor, mask: torch.Tensor, tokens: int, known: int
) -> torch.Tensor:
    """The `tokens` that `draft` would write after ids [batch, n], greedily: int64 [batch, tokens], on its device.

    memory: an empty cache of the draft's; all but the last of them are read into it. known: tokens that the reader of
    what it writes knows. It does not stop where it would end, so that no row depends on another.
    ValueError where ids are of another tokenizer.
    """
    if int(ids.max()) >= vocabulary(draft):
        raise ValueError(
            f"the prompt has token {int(ids.max())} and the draft knows {vocabulary(draft)}: a draft shares the "
            "tokenizer of the model that it writes for"
        )
    ends = torch.tensor(_ends(draft), dtype=torch.long, device=draft.device)
    new, mask = ids.to(draft.device), mask.to(draft.device)
    written = []
    for _ in range(tokens):
        logits = draft(
            new, **cache_argument(draft, memory), use_cache=True, logits_to_keep=1, **placed(mask, new.shape[1])
        ).logits[:, -1, :known]
        new = logits.index_fill(-1, ends[ends < logits.shape[-1]], float("-inf")).argmax(-1, keepdim=True)
        written.append(new)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    return torch.cat(written, 1)


def _ends(draft: PreTrainedModel) -> list[int]:
    """Tokens that end a text."""
    found = getattr(draft.generation_config, "eos_token_id", None)
    return [] if found is None else found if isinstance(found, list) else [found]
