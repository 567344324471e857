"""What `longwave generate --diffusion` does: a masked-diffusion model's answer, block by block."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from longwave.checks import nearest
from longwave.cli.common import Source, encode, named, parse_options
from longwave.cli.console import say, show_json, waiting

Diffusion = Annotated[
    bool,
    typer.Option("--diffusion", help="Answer as a masked-diffusion model (LLaDA, Dream) does, by blocks of masks."),
]
BlockLength = Annotated[
    int | None, typer.Option(min=1, help="With --diffusion: tokens of a block; else the answer is one.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="With --diffusion: steps of the whole answer; else one a token.")
]
Threshold = Annotated[
    float | None, typer.Option(help="With --diffusion, instead of --steps: keep every token of this confidence.")
]
Keep = Annotated[
    str | None,
    typer.Option(help='With --diffusion: "prefix" or "dual", what --method holds while a block is read; else nothing.'),
]
Refresh = Annotated[int | None, typer.Option(min=1, help="With --keep: read all anew after so many passes of a block.")]
SamplerOptions = Annotated[
    list[str] | None, typer.Option("--sampler", help="With --diffusion: a sampler's option, NAME=VALUE; repeats.")
]

OWN = ("block_length", "steps", "threshold", "keep", "refresh", "sampler")  # that decide nothing without --diffusion
OTHERS = ("save_prefix", "save_size", "prefix", "prefill_chunk", "graph", "compiled", "measure")
HELD = ("method", "budget", "profile", "option")  # that decide nothing without --keep


@dataclass(frozen=True)
class Wanted:
    """What the command was told of how to sample."""

    max_new_tokens: int
    block_length: int | None
    steps: int | None
    threshold: float | None
    keep: str | None
    refresh: int | None
    seed: int
    sampler: dict[str, Any]


def given(ctx: Any, *names: str) -> list[str]:
    """Those options of the command that were given, as they are spelled there."""
    said = {"compiled": "--compile", "option": "-o"}
    found = [name for name in names if ctx.get_parameter_source(name).name != "DEFAULT"]
    return [said.get(name, f"--{name.replace('_', '-')}") for name in found]


def check_options(ctx: Any, diffusion: bool, keep: str | None) -> None:
    """Raise ValueError for options that decide nothing, or that another way of generating has."""

    if not diffusion:
        if names := given(ctx, *OWN):
            raise ValueError(f"{names[0]} is for a masked-diffusion model: give --diffusion with it")
        return
    if names := given(ctx, *OTHERS):
        raise ValueError(f"--diffusion reads all of a text for every block: leave {names[0]} out")
    if keep is None and (names := given(ctx, *HELD)):
        raise ValueError(f"{names[0]} says how a text is held, and --diffusion holds one with --keep prefix or dual")


def sampler_options(items: list[str] | None, **told: Any) -> dict[str, Any]:
    """Of --sampler, and of the options that causal models take too where they were given."""
    options = parse_options(items)
    for name, value in told.items():
        if value and name in options:
            raise ValueError(f"{name} was given twice: leave it out of --sampler")
        options |= {name: value} if value else {}
    return options


def answer(
    source: Source, text: str, chat: bool, wanted: Wanted, how: tuple[str, dict[str, Any], Any, Any]
) -> dict[str, Any]:
    """The answer and what it took. how: (method, its options, budget, profile) that hold what is kept."""
    import torch

    from longwave.diffusion import blocks
    from longwave.methods import get_method
    from longwave.plan.profile import Profile

    name, options, budget, path = how
    method = None if wanted.keep is None else get_method(name, **options)
    profile = Profile.load(path) if path is not None else None
    sampler = _sampler(source.skeleton.config, wanted.sampler)
    encoded = encode(source.tokenizer, text, chat)
    count = encoded["input_ids"].shape[1]
    source.check_length(count, wanted.max_new_tokens)
    coming = count + wanted.max_new_tokens
    if method is not None:
        source.check(method, budget, coming)
    loaded = source.load()
    memory = None if method is None else source.cache(loaded, method, budget, profile, coming, measure=True)
    ids, mask = (encoded[name].to(source.device) for name in ("input_ids", "attention_mask"))
    begun, passes, made = time.perf_counter(), 0, [ids]
    with waiting(f"{wanted.max_new_tokens} masks after {count:,} tokens") as done:
        for block in blocks(
            loaded,
            ids,
            mask,
            sampler=sampler,
            max_new_tokens=wanted.max_new_tokens,
            block_length=wanted.block_length,
            steps=wanted.steps,
            threshold=wanted.threshold,
            cache=memory,
            keep=wanted.keep,
            refresh=wanted.refresh,
            seed=wanted.seed,
        ):
            passes, end = passes + block.passes, int(block.ends[0])
            made.append(block.tokens)
        done()
    seconds, written = time.perf_counter() - begun, end - count
    found = source.tokenizer.decode(torch.cat(made, 1)[0, count:end], skip_special_tokens=True)
    about = {"text": found, "prompt_tokens": count, "new_tokens": written, "passes": passes, "seed": wanted.seed}
    about |= {"seconds": seconds, "tokens_per_second": written / seconds, "sampler": str(sampler)}
    about |= {"dtype": named(loaded.dtype), "device": str(loaded.device)}
    return {"about": about, "memory": memory}


def show(found: dict[str, Any], as_json: bool) -> None:
    about, memory = found["about"], found["memory"]
    if as_json:
        show_json(about | ({} if memory is None else memory.report().as_dict()))
        return
    print(about["text"])
    say(
        f"{about['new_tokens']} tokens in {about['passes']} passes and {about['seconds']:.2f} s, "
        f"{about['tokens_per_second']:.1f} tokens a second, by {about['sampler']} "
        f"in {about['dtype']} on {about['device']}"
    )
    if memory is not None:
        say(str(memory.report()))


def _sampler(config: Any, options: dict[str, Any]) -> Any:
    from longwave.diffusion import Dream, LLaDA

    kind: Any = Dream if getattr(config, "logit_shift", False) else LLaDA
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            raise ValueError(f"{kind.__name__}'s sampler has no option {name!r}: {nearest(name, known)}")
    return kind(**options)
