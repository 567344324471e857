"""The command line: generate, calibrate, inspect, eval, demo."""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from longwave.console import progress, show_json, show_table, stderr, user_errors, waiting
from longwave.evals.commands import app as eval_commands
from longwave.evals.spec import parse_value

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(eval_commands, name="eval")

Model = Annotated[str, typer.Option(help='Hub id, local path, or "smollm2" (a small model from PyPI).')]
MethodName = Annotated[
    str, typer.Option("--method", help='How to hold the cache: "fourier", "fourier-paper", "kivi", "dense".')
]
Budget = Annotated[
    str | None,
    typer.Option(
        help='Fraction of the dense bytes ("0.25") or a size ("512MiB"); presets such as fourier-paper take none.'
    ),
]
ProfilePath = Annotated[
    Path | None, typer.Option(help="Profile made by `longwave calibrate`; the shipped one otherwise.")
]
OptionList = Annotated[list[str] | None, typer.Option("--option", "-o", help="Method option, NAME=VALUE; repeats.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", "mps".')]
Dtype = Annotated[str, typer.Option(help='"auto", "float32", "bfloat16", "float16".')]


def parse_options(items: list[str] | None) -> dict[str, Any]:
    """["segment=512", "keep=(0.1, 0.4)"] -> {"segment": 512, "keep": (0.1, 0.4)}."""
    options = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"a method option is NAME=VALUE, got {item!r}")
        options[name] = parse_value(value)
    return options


def _show_warning(message: object, *_: object, **__: object) -> None:
    """One line without the place in the code."""
    stderr.print(f"longwave: {message}", highlight=False, soft_wrap=True, markup=False)


def load_model(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers.utils import logging

    from longwave.models import load

    # transformers 5.24 renames the argument to `cache`, which earlier ones do not know; the old name works until 5.40
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    warnings.showwarning = _show_warning
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    choices = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in choices:
        raise ValueError(f"dtype is one of {', '.join(choices)}, got {dtype!r}")
    with waiting(f"loading {model}"):
        loaded: Any
        loaded, tokenizer = load(model, dtype=choices[dtype])
        try:
            return loaded.to(device), tokenizer
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot use device {device!r}: {error}") from None


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def check_length(model: Any, tokens: int, new: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens + new > limit:
        raise ValueError(f"{tokens} tokens of prompt and {new} new ones exceed this model's context of {limit}")


def why_python(model: Any, memory: Any, graph: bool | None) -> str | None:
    """Why transformers' own loop decodes, or None where a CUDA graph does."""
    from longwave.decode import supports

    if graph is False:
        return "--no-graph"
    if model.device.type != "cuda":
        return f"a graph needs CUDA, and the model is on {model.device.type}"
    return supports(model, memory)


class Clock:
    """A stopping criterion that never stops: it notes when the prompt was read and when decoding was under way.

    The first step compiles kernels or captures a graph, so decoding is timed from the second token on.
    """

    def __init__(self, device: Any):
        self.device = device
        self.times = [self.now()]

    def now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        if len(self.times) < 3:
            self.times.append(self.now())
        return ids.new_zeros(ids.shape[0], dtype=bool)

    def read(self, new: int) -> dict[str, Any]:
        """Seconds, tokens a second (None where fewer than three tokens came), and on CUDA the peak of memory."""
        import torch

        end = self.now()
        found: dict[str, Any] = {"seconds": end - self.times[0], "prefill_seconds": self.times[1] - self.times[0]}
        found["tokens_per_second"] = (new - 2) / (end - self.times[2]) if new > 2 else None
        if self.device.type == "cuda":
            found["peak_memory"] = torch.cuda.max_memory_allocated(self.device)
        return found


def show_pace(pace: dict[str, Any]) -> str:
    reason = f" ({pace['loop_reason']})" if pace["loop_reason"] else ""
    rate = pace["tokens_per_second"]
    parts = [
        f"prompt read in {pace['prefill_seconds']:.2f} s",
        "too few tokens to time decoding" if rate is None else f"{rate:.1f} tokens a second",
        f"decoded by {pace['loop']}{reason}",
    ]
    if "peak_memory" in pace:
        parts.append(f"peak memory {pace['peak_memory']:,} bytes")
    return ", ".join(parts)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt, or a question about --file.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Text to read before the prompt.")] = None,
    model: Model = "smollm2",
    method: MethodName = "fourier",
    budget: Budget = None,
    profile: ProfilePath = None,
    option: OptionList = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many tokens at most.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from the tokens that make up this share.")
    ] = None,
    seed: int = 0,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")] = True,
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, help="Read the prompt in chunks of this many tokens.")
    ] = None,
    graph: Annotated[
        bool | None,
        typer.Option("--graph/--no-graph", help="Decode by a CUDA graph, or not; otherwise on CUDA where it can be."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fuse the layers of a graph by torch.compile: slow to begin, faster then.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer a prompt, with a report of the bytes held and of the time taken."""
    with user_errors():
        parts = [read_text(file)] if file else []
        parts += [prompt] if prompt and prompt.strip() else []
        if not parts:
            raise ValueError("the prompt is empty: give a PROMPT, a --file, or both")
        import torch
        from transformers import TextStreamer

        import longwave

        loaded, tokenizer = load_model(model, device, dtype)
        text = "\n\n".join(parts)
        if chat and tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            encoded = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = tokenizer(text, return_tensors="pt", verbose=False)
        encoded = encoded.to(loaded.device)
        count = encoded["input_ids"].shape[1]
        check_length(loaded, count, max_new_tokens)
        memory = longwave.cache(loaded, method, budget=budget, profile=profile, **parse_options(option))
        why = why_python(loaded, memory, graph)
        if graph and why:
            raise ValueError(f"--graph: {why}")
        if compiled and why:
            raise ValueError(f"--compile is for the steps of a graph, and there is none: {why}")
        torch.manual_seed(seed)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        if not temperature and (top_k, top_p) != (None, None):
            raise ValueError("--top-k and --top-p choose what is sampled from: give a --temperature above 0")
        sampling |= {name: value for name, value in (("top_k", top_k), ("top_p", top_p)) if value is not None}
        if prefill_chunk:
            sampling["prefill_chunk_size"] = prefill_chunk
        streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        if loaded.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(loaded.device)
        clock = Clock(loaded.device)
        if not as_json and stderr.is_terminal:
            stderr.print(f"reading {count:,} tokens ...", style="dim")
        loop = loaded.generate if why else partial(longwave.generate, loaded, compile=compiled)
        try:
            out = loop(
                **encoded,
                past_key_values=memory,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=[clock],
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        except longwave.decode.Unsupported as error:  # seen late: much of the answer may be out
            raise ValueError(f"{error}: {'leave out --compile' if compiled else 'pass --no-graph'}") from error
        pace = {"loop": "python" if why else "graph", "loop_reason": why, **clock.read(out.shape[1] - count)}
        if as_json:
            answer = tokenizer.decode(out[0, count:], skip_special_tokens=True)
            show_json({"text": answer, "prompt_tokens": count, "seed": seed, **pace, **memory.report().as_dict()})
        else:
            stderr.print(show_pace(pace), style="dim", highlight=False, soft_wrap=True)
            stderr.print(str(memory.report()), style="dim", highlight=False, soft_wrap=True)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Hub id, local path, or smollm2.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to measure on; repeats.")],
    out: Annotated[Path, typer.Option(help="Where to write the profile (JSON).")],
    method: MethodName = "fourier",
    option: OptionList = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 3072,
    windows: Annotated[int, typer.Option(min=1, help="Windows in all, shared between the texts.")] = 8,
    scored: Annotated[int, typer.Option(min=1, help="Last tokens of a window, which are scored for the plan.")] = 128,
    plan: Annotated[
        bool | None,
        typer.Option("--plan/--channels-only", help="Measure every head for the planner (the long part), or not."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows held in memory at once.")] = 8,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure what a model's channels and heads tolerate, and write a profile. A killed run goes on where it was."""
    with user_errors():
        from longwave.calibrate import calibrate as measure
        from longwave.methods import Fourier, get_method

        chosen = get_method(method, **parse_options(option))
        if not isinstance(chosen, Fourier):
            raise ValueError(f"{method} needs no profile: only fourier does")
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent} to write the profile to")
        if out.is_dir():
            raise ValueError(f"{out} is a folder: name the file to write the profile to")
        texts = [read_text(path) for path in text]
        loaded, tokenizer = load_model(model, device, dtype)
        with progress("measuring") as advance:
            profile = measure(
                loaded,
                tokenizer,
                texts,
                chosen,
                tokens,
                windows,
                scored=scored,
                plan=plan,
                batch=batch,
                partial=out.with_name(out.name + ".part"),
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
            what = "channels and heads" if summary["plan"] else "channels alone"
            print(f"wrote {out}: {what}, {summary['windows']} windows, {summary['tokens']:,} tokens")


@app.command()
def inspect(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Text to read; Python's help topics otherwise.")
    ] = None,
    model: Model = "smollm2",
    method: MethodName = "fourier",
    budget: Budget = None,
    profile: ProfilePath = None,
    option: OptionList = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to read.")] = 2048,
    layer: Annotated[int, typer.Option(help="Layer of the channel to plot.")] = 0,
    head: int = 0,
    channel: Annotated[int | None, typer.Option(help="Channel to plot; the first compressed one otherwise.")] = None,
    side: Annotated[str, typer.Option(help='"k" or "v".')] = "k",
    out: Annotated[Path, typer.Option(help="Folder for kept.png and channel.png.")] = Path("out"),
    device: Device = "cpu",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """What a cache holds: bytes by part, kept channels by layer and rotary pair, one channel and its spectrum."""
    with user_errors():
        if side not in ("k", "v"):
            raise ValueError(f'side is "k" or "v", got {side!r}')
        import longwave
        from longwave.evals.data import pydoc_haystack
        from longwave.evals.fork import fork, prefill
        from longwave.inspect import kept_by_pair, plot_channel, plot_kept
        from longwave.methods import Fourier

        text = read_text(file) if file else pydoc_haystack()
        loaded, tokenizer = load_model(model, device, dtype)
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
        check_length(loaded, ids.shape[1], 0)
        empty = longwave.cache(loaded, method, budget=budget, profile=profile, **parse_options(option))
        with waiting(f"reading {ids.shape[1]:,} tokens"):
            exact = prefill(loaded, ids)
            held = fork(exact, empty)
        report = held.report()
        result: dict[str, Any] = report.as_dict()
        bound = held.method
        if isinstance(bound, Fourier):
            out.mkdir(parents=True, exist_ok=True)
            indices = [i for i, _ in enumerate(held.layers) if held.layers[i] in list(held.memory_layers())]
            if layer not in indices:
                raise ValueError(f"layer {layer} holds no full attention; choose from {indices}")
            table = bound.kept[indices.index(layer)]["kv".index(side)]
            if not 0 <= head < table.shape[0]:
                raise ValueError(f"layer {layer} has heads 0 to {table.shape[0] - 1}")
            compressed = (~table[head]).nonzero()[:, 0].tolist()
            channel = channel if channel is not None else (compressed or [0])[0]
            plot_kept(bound, out / "kept.png", f"{model}: {bound}")
            result["channel"] = plot_channel(exact, held, layer, side, head, channel, out / "channel.png")
            shares = kept_by_pair(bound)
            result["kept"] = [
                {
                    "layer": index,
                    "k": float(k.mean()),
                    "v": float(v.mean()),
                    "k_by_pair": k.tolist(),
                    "v_by_pair": v.tolist(),
                }
                for index, k, v in zip(indices, *shares, strict=True)
            ]
        if as_json:
            show_json(result)
            return
        show_table(
            "bytes",
            ["part", "bytes"],
            [*report.parts.items(), ("all", report.nbytes), ("dense cache", report.dense_nbytes)],
        )
        print(f"ratio {report.ratio:.3f} after {report.tokens:,} tokens")
        if isinstance(bound, Fourier):
            rows = []
            for entry in result["kept"]:
                quarters = [f"{x.float().mean():.2f}" for x in _quarters(entry["k_by_pair"])]
                rows.append([entry["layer"], f"{entry['k']:.2f}", *quarters, f"{entry['v']:.2f}"])
            show_table("share of channels kept", ["layer", "K", "K fast pairs", "..", "..", "K slow pairs", "V"], rows)
            print(f"{out / 'kept.png'}\n{out / 'channel.png'}")


def _quarters(values: list[float]) -> Any:
    import torch

    return torch.tensor(values).chunk(4)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the numbers.")] = Path("out/demo"),
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Document to measure on; Python's help topics otherwise.")
    ] = None,
    budget: Annotated[list[str], typer.Option(help="Budget of fourier; repeats.")] = ["0.125", "0.04"],  # noqa: B006
    seed: int = 42,
) -> None:
    """Dense and fourier side by side on SmolLM2: needles, loss, bytes, speed, a summary. A few minutes on two cores."""
    with user_errors():
        from longwave.demo import run

        run(out, file, budget, seed)


if __name__ == "__main__":
    app()
