"""longwave inspect: what a cache holds, in bytes, bits, kept channels and pictures, and what it costs on the text that
follows; or what a saved file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longwave.cli.common import (
    Budget,
    Device,
    Dtype,
    ExtendRule,
    ExtendTo,
    Json,
    Measure,
    MethodName,
    Model,
    OptionList,
    ProfilePath,
    Source,
    named,
    read_document,
    read_method,
)
from longwave.cli.console import show_json, show_table, user_errors
from longwave.cli.reading import reading

SCORED = 256  # tokens of the text after those that were read


def command(
    saved: Annotated[
        Path | None, typer.Argument(help="A saved cache: what this file holds, every byte of it checked.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Text to read, - for standard input; Python's help topics otherwise."),
    ] = None,
    model: Model = "smollm2",
    method: MethodName = "fourier",
    budget: Budget = None,
    profile: ProfilePath = None,
    measure: Measure = True,
    extend_to: ExtendTo = None,
    extend_rule: ExtendRule = None,
    option: OptionList = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to read.")] = 2048,
    layer: Annotated[
        int | None, typer.Option(help="Layer of the channel to plot; the first of full attention otherwise.")
    ] = None,
    head: int = 0,
    channel: Annotated[int | None, typer.Option(help="Channel to plot; the first compressed one otherwise.")] = None,
    side: Annotated[str, typer.Option(help='"k" or "v".')] = "k",
    out: Annotated[Path, typer.Option(help="Folder for kept.png and channel.png.")] = Path("out"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """What a cache holds: bytes by part, bits of every head, merged segments, kept channels by layer and rotary pair,
    one channel and its spectrum; and what it costs, as planned and on the text that follows.

    Given a saved cache, what that file holds."""
    with user_errors():
        if saved is not None:
            show_saved(saved, as_json)
            return
        if side not in ("k", "v"):
            raise ValueError(f'side is "k" or "v", got {side!r}')
        text = read_document(file) if file else None
        chosen = read_method(method, option, budget, dtype)
        from longwave.cli.heads import head_bits, head_rows, measured, merged_segments
        from longwave.cli.pictures import kept_by_pair, plot_channel, plot_kept
        from longwave.evals.data import pydoc_haystack
        from longwave.evals.fork import can_fork, fork, needs_of, prefill, read
        from longwave.methods.segmented import SegmentedBound
        from longwave.plan.profile import Profile
        from longwave.shape import CacheShape, context_limit

        known = Profile.load(profile) if profile is not None else None
        source = Source(model, device, dtype, extend_to, extend_rule)
        whole = source.tokenizer(text or pydoc_haystack(), return_tensors="pt", verbose=False).input_ids
        ids = whole[:, :tokens]
        count = ids.shape[1]
        following = whole[:, count : min(count + SCORED + 1, context_limit(source.skeleton) or whole.shape[1])]
        coming = count + max(0, following.shape[1] - 1)
        source.check_length(count, 0, source.check(chosen, budget, coming))
        shape = CacheShape.of(source.skeleton.config.get_text_config(decoder=True), source.skeleton.dtype)
        layer = shape.memory_layers[0] if layer is None else layer
        if layer not in shape.memory_layers:
            raise ValueError(f"layer {layer} holds no full attention; choose from {list(shape.memory_layers)}")
        if not 0 <= head < shape.kv_heads:
            raise ValueError(f"layer {layer} has heads 0 to {shape.kv_heads - 1}")
        loaded = source.load()
        empty = source.cache(loaded, chosen, budget, known, coming, measure)
        with reading(loaded, count):
            exact = prefill(loaded, ids, needs=needs_of([empty]))
            if can_fork(empty):
                held = fork(exact, empty)
            else:
                held = empty
                read(loaded, held, ids)
        report = held.report()
        result: dict[str, Any] = {**report.as_dict(), "dtype": named(loaded.dtype), "device": str(loaded.device)}
        expected = getattr(held.method, "expected", None)
        if expected is not None:
            result["expected_kl"] = {"kl": expected.kl, "error": expected.error}
        pages = isinstance(held.method, SegmentedBound) and next(held.memory_layers()).held() == [count]
        kept = held.method.kept if pages else ()  # of every memory layer: which channels of K and V stay values
        if kept:
            out.mkdir(parents=True, exist_ok=True)
            table = kept[shape.memory_layers.index(layer)]["kv".index(side)]
            compressed = (~table[head]).nonzero()[:, 0].tolist()
            channel = channel if channel is not None else (compressed or [0])[0]
            plot_kept(kept, out / "kept.png", f"{model}: {held.method}")
            result["channel"] = plot_channel(exact, held, layer, side, head, channel, out / "channel.png")
            result["kept"] = [
                {
                    "layer": index,
                    "k": float(k.mean()),
                    "v": float(v.mean()),
                    "k_by_pair": k.tolist(),
                    "v_by_pair": v.tolist(),
                }
                for index, k, v in zip(shape.memory_layers, *kept_by_pair(kept), strict=True)
            ]
        bits = head_bits(held.method) if pages and held.method.plan else []
        if bits:
            result |= {"bits": bits, "merged": merged_segments(held.method, held)}
        if following.shape[1] > 1:  # last, since both caches read it
            result["measured"] = measured(loaded, exact, held, following)
        if as_json:
            show_json(result)
            return
        show_table(
            "bytes",
            ["part", "bytes"],
            [*report.parts.items(), ("all", report.nbytes), ("dense cache", report.dense_nbytes)],
        )
        print(report.method)
        print(f"ratio {report.ratio:.3f} in {result['dtype']} after {report.tokens:,} tokens")
        if expected is not None:
            print(f"expected {expected} nats a token of text, as the plan was measured")
        if cost := result.get("measured"):
            print(
                f"measured KL {cost['kl']:.2g} nats, loss {cost['over_dense']:+.2g} nats over dense, "
                f"{cost['same_top1']:.1%} the same top-1: next {cost['tokens']:,} tokens of this text"
            )
        else:
            print("measured nothing: no text follows what was read, or the model's context ends there")
        if bits:
            merged = result["merged"]
            print(
                f"merged {merged['segments']:,} of {merged['of_segments']:,} segments: those of {merged['heads']:,} "
                f"heads of {merged['of_heads']:,}"
            )
            heads = [f"head {head}" for head in range(shape.kv_heads)]
            show_table("bits a number, K and V", ["layer", *heads], head_rows(bits))
        if kept:
            rows = []
            for entry in result["kept"]:
                quarters = [f"{x.float().mean():.2f}" for x in _quarters(entry["k_by_pair"])]
                rows.append([entry["layer"], f"{entry['k']:.2f}", *quarters, f"{entry['v']:.2f}"])
            show_table("share of channels kept", ["layer", "K", "K fast pairs", "..", "..", "K slow pairs", "V"], rows)
            print(f"{out / 'kept.png'}\n{out / 'channel.png'}")


def show_saved(path: Path, as_json: bool) -> None:
    """What a saved cache holds."""
    from longwave.saved import look

    found = look(path)
    if as_json:
        show_json(found.as_dict())
        return
    how = "exactly, as its method holds it" if found.kind == "exact" else f"K and V coded in {found.segments} segments"
    rows = ", ".join(f"{n:,}" for n in found.rows)
    show_table(
        "saved cache",
        ["what", "value"],
        [
            ("model", found.model),
            ("method", found.method),
            ("saved", how),
            ("tokens", f"{found.tokens:,}" if found.rows == [found.tokens] else f"{found.tokens:,} (rows of {rows})"),
            ("bytes", f"{found.nbytes:,}"),
            ("bytes of a dense cache", f"{found.dense_nbytes:,}"),
            ("ratio", f"{found.ratio:.3f}"),
            ("format", found.version),
        ],
    )


def _quarters(values: list[float]) -> Any:
    import torch

    return torch.tensor(values).chunk(4)
