"""longwave calibrate: measure what a model's heads, or channels, tolerate on texts of yours, and write a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longwave.cli.common import Device, Dtype, Json, MethodName, OptionList, Source, read_document, read_method
from longwave.cli.console import progress, show_json, user_errors


def command(
    model: Annotated[str, typer.Argument(help="Hub id, local path, or smollm2.")],
    out: Annotated[Path, typer.Option(help="Where to write the profile (JSON).")],
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Text to measure on, - for standard input; repeats. The package's own otherwise."),
    ] = None,
    method: MethodName = "fourier",
    option: OptionList = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 3072,
    windows: Annotated[int, typer.Option(min=1, help="Windows in all, shared between the texts.")] = 9,
    scored: Annotated[int, typer.Option(min=1, help="Last tokens of a window, which are scored for the plan.")] = 256,
    probes: Annotated[int, typer.Option(min=1, help="Backward passes a window.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Windows held in memory at once.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure what a model's heads tolerate on texts of yours, and write a profile. `longwave generate` and
    `longwave.cache` measure a model by themselves on text that ships with the package."""
    with user_errors():
        chosen = read_method(method, option, dtype=dtype)
        from longwave.methods import METHODS
        from longwave.plan.automatic import own_texts
        from longwave.plan.calibrate import calibrate, check_asked

        if not chosen.uses_profile:
            users = [name for name, cls in METHODS.items() if cls.uses_profile]
            raise ValueError(f"{method} needs no profile: only {', '.join(users)} do")
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} to write the profile to")
        if out.is_dir():
            raise ValueError(f"{out} is a folder: name the file to write the profile to")
        texts = [read_document(path) for path in text] if text else own_texts()[:windows]
        source = Source(model, device, dtype)
        check_asked(source.skeleton, texts, chosen, tokens, windows, scored, probes, batch)
        loaded = source.load()
        with progress("measuring") as advance:
            profile = calibrate(
                loaded,
                source.tokenizer,
                texts,
                chosen,
                tokens,
                windows,
                scored=scored,
                probes=probes,
                batch=batch,
                model_id=model,
                progress=advance,
            )
        profile.save(out)
        summary = {
            "profile": str(out),
            "model": model,
            "windows": profile.text["windows"],
            "tokens": profile.text["tokens"],
            "plan": profile.sensitivity is not None,
        }
        if as_json:
            show_json(summary)
        else:
            what = "heads, for plans" if summary["plan"] else "channels"
            print(f"wrote {out}: {what}, {summary['windows']} windows, {summary['tokens']:,} tokens")
