"""What `longwave generate --save-prefix` and `--prefix` share: a text that is read once, and prompts that follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longwave.cli.common import filled_in

_PLACE = "\u2402text\u2402"  # stands where the text goes while a chat template is filled in


def around(tokenizer: Any, prompt: str | None, chat: bool) -> tuple[str, str]:
    """What stands before a text and behind it where both make one turn, the prompt behind."""
    turn = _PLACE + (f"\n\n{prompt}" if prompt else "")
    if not (chat and tokenizer.chat_template):
        return "", turn.removeprefix(_PLACE)
    filled = filled_in(tokenizer, turn)
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


def turn_ids(tokenizer: Any, prompt: str) -> Any:
    """Of a prompt that follows an answer in a chat template, and of what ends the answer before it. Without a template
    it begins a paragraph."""
    if not tokenizer.chat_template:
        return ids_of(tokenizer, f"\n\n{prompt}", first=False)
    _, place, after = filled_in(tokenizer, "?", _PLACE, prompt).partition(_PLACE)
    if not place:
        raise ValueError("this tokenizer's chat template does not leave an answer as it is: a talk cannot go on")
    return ids_of(tokenizer, after, first=False)


def as_input(*parts: Any) -> dict[str, Any]:
    """What a model is given of ids [1, n] that follow each other."""
    import torch

    ids = torch.cat([part.cpu() for part in parts], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read_prefix(model: Any, cache: Any, ids: Any, chunk: int | None) -> None:
    """Give a cache ids that it has not read, in passes of `chunk` tokens where that is given."""
    import torch

    from longwave.frame import cache_argument

    with torch.no_grad():
        for part in ids.to(model.device).split(chunk or ids.shape[1], 1):
            model(part, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)


def going_on(model: Any, cache: Any, ids: Any, choice: dict[str, Any]) -> dict[str, Any]:
    """`choice` for a prompt of which a cache holds the beginning. Where it names chunks, all of the rest but the last
    token is read here: transformers 5.17 gives the whole prompt again when it is to read in chunks."""
    held, chunk = cache.get_seq_length(), choice.get("prefill_chunk_size")
    if not (held and chunk):
        return choice
    if held < ids.shape[1] - 1:
        read_prefix(model, cache, ids[:, held:-1], chunk)
    return {name: value for name, value in choice.items() if name != "prefill_chunk_size"}


def coder_for(memory: Any, model: Any, tokenizer: Any, size: str) -> Any:
    """The model's own codec, fitted now where none is kept, at a size. Raises ValueError, before anything is read, for
    a size that it has not, and where `memory` cannot be filled from a coded file."""
    from longwave.budget import parse_budget
    from longwave.codec import codec_for
    from longwave.saved.saving import coder_at
    from longwave.saved.settling import check_needs

    check_needs(memory, "a coded file")
    return coder_at(codec_for(model, tokenizer), model.device, parse_budget(size)[0])


def keep_prefix(
    model: Any,
    memory: Any,
    ids: Any,
    path: Path,
    size: str | None,
    coder: Any,
    chunk: int | None,
    about: dict[str, Any],
) -> None:
    """Fill an empty cache with ids, and the file with what it holds. size: with the model's K and V coded instead, by
    `coder`; the cache is then filled from the file, so that it holds what `--prefix` will find in it. chunk: read in
    passes of so many tokens; what is coded is coded behind each."""
    import longwave

    if size is None:
        read_prefix(model, memory, ids, chunk)
        longwave.save(memory, ids, path, exact=True, about=about)
        return
    code_prefix(model, memory, ids, path, size, coder, chunk, about)
    longwave.restore(model, path, memory, coder=coder)


def code_prefix(
    model: Any, memory: Any, ids: Any, path: Path, size: str, coder: Any, chunk: int | None, about: dict[str, Any]
) -> int:
    """Read ids, and write a file from which caches such as `memory` can be filled; its bytes. All as in
    `keep_prefix`."""
    import longwave
    from longwave.frame import Needs, observing
    from longwave.saved import read_coded

    asked = next(memory.memory_layers()).needs
    needs = Needs(queries=asked.queries, every=asked.every)
    if chunk is not None:
        return read_coded(model, ids, path, size=size, chunk=chunk, coder=coder, needs=needs, about=about)
    read_prefix(model, dense := observing(model, needs), ids, None)
    return longwave.save(dense, ids, path, size=size, coder=coder, about=about)


def is_chat(kept: Any) -> bool:
    """Whether a saved text lies in a chat template. kept: what `longwave.saved.look` found of its file."""
    if not isinstance(kept.about.get("chat"), bool):
        raise ValueError(f"{kept.path} was not saved by `longwave generate --save-prefix`: restore it in Python")
    if "answered" in kept.about:
        raise ValueError(f"{kept.path} is a talk: /load it in `longwave chat`")
    return kept.about["chat"]


def check_prefix(
    ctx: Any,
    prompt: str | None,
    file: Path | None,
    save_prefix: Path | None,
    save_size: str | None,
    prefill_chunk: int | None,
    prefix: Path | None,
) -> Any:
    """What `longwave.saved.look` finds of a prefix, where one is given. Raises ValueError for options that do not go
    together."""
    if save_prefix is not None and file is None:
        raise ValueError("--save-prefix keeps the text of --file: give one")
    if save_size is not None:
        from longwave.budget import parse_budget

        if save_prefix is None:
            raise ValueError("--save-size codes what --save-prefix keeps: give both")
        if parse_budget(save_size)[0] is None and prefill_chunk is not None:
            raise ValueError("--save-size is a fraction with --prefill-chunk: what is coded is coded while it is read")
    if (prefix or save_prefix) and not (prompt and prompt.strip()):
        raise ValueError("a PROMPT goes with --prefix and --save-prefix: what is asked about their text")
    if prefix is None:
        return None
    if file is not None:
        raise ValueError("--prefix stands for the text of --file: give one of the two")
    from longwave.saved import look

    kept = look(prefix)
    decided = ("chat", "method", "budget", "profile", "option") if kept.kind == "exact" else ("chat",)
    for name in decided:
        if ctx.get_parameter_source(name).name != "DEFAULT":
            said = "--chat/--no-chat" if name == "chat" else f"--{name}"
            raise ValueError(f"{said} was decided when the prefix was saved, and {prefix} has it: leave it out")
    return kept
