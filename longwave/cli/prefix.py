"""What `longwave generate --save-prefix` and `--prefix` share: a text that is read once, and prompts that follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longwave.cli.common import encode

_PLACE = "\u2402text\u2402"  # stands where the text goes while a chat template is filled in


def around(tokenizer: Any, prompt: str | None, chat: bool) -> tuple[str, str]:
    """What stands before a text and behind it where both make one turn, the prompt behind."""
    turn = _PLACE + (f"\n\n{prompt}" if prompt else "")
    if not (chat and tokenizer.chat_template):
        return "", turn.removeprefix(_PLACE)
    filled = tokenizer.decode(encode(tokenizer, turn, chat).input_ids[0])
    before, place, after = filled.partition(_PLACE)
    if not place:
        raise ValueError("this tokenizer's chat template does not leave the text as it is: pass --no-chat")
    return before, after


def ids_of(tokenizer: Any, text: str, first: bool) -> Any:
    """Token ids int64 [1, n]. first: whether the text begins the input, and what models put there comes with it."""
    return tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=first).input_ids


def prefix_ids(tokenizer: Any, text: str, chat: bool) -> Any:
    """Of a text that prompts will follow: all that comes before the prompt."""
    before, _ = around(tokenizer, None, chat)
    return ids_of(tokenizer, before + text, first=not before)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Of a prompt that follows such a text."""
    return ids_of(tokenizer, around(tokenizer, prompt, chat)[1], first=False)


def read_prefix(model: Any, cache: Any, ids: Any) -> None:
    """Give ids to an empty cache, in one pass."""
    import torch

    from longwave.frame import cache_argument

    with torch.no_grad():
        model(ids.to(model.device), **cache_argument(model, cache), use_cache=True, logits_to_keep=1)


def is_chat(path: Path) -> bool:
    """Whether a saved text lies in a chat template. SavedCacheError for a file that longwave generate did not write."""
    from longwave.saved import SavedCacheError, look

    about = look(path, whole=False).about
    if not isinstance(about.get("chat"), bool):
        raise SavedCacheError(f"{path} was not saved by `longwave generate --save-prefix`: restore it in Python")
    return about["chat"]
