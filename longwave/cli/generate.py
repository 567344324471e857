"""longwave generate: answer a prompt, with a report of the bytes held and of the time taken."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from longwave.cli import diffuse
from longwave.cli.answer import (
    MaxNewTokens,
    PrefillChunk,
    Read,
    Seed,
    Temperature,
    TopK,
    TopP,
    loop_of,
    told,
    why_python,
)
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
    encode,
    named,
    parse_options,
    read_document,
    read_method,
)
from longwave.cli.console import say, show_json, user_errors
from longwave.cli.prefix import (
    as_input,
    check_prefix,
    coder_for,
    going_on,
    is_chat,
    keep_prefix,
    prefix_ids,
    prompt_ids,
    read_prefix,
)
from longwave.cli.reading import reading


def command(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The prompt, or a question about --file.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Text to read before the prompt; - is standard input.")
    ] = None,
    save_prefix: Annotated[
        Path | None,
        typer.Option(help="Keep what was read of --file here, for --prefix: the cache as it is, or by --save-size."),
    ] = None,
    save_size: Annotated[
        str | None,
        typer.Option(help='Code it: K and V in this fraction of their 16-bit bytes ("0.05"), or a file of this size.'),
    ] = None,
    prefix: Annotated[
        Path | None, typer.Option(help="A text that --save-prefix kept, instead of --file: it is not read again.")
    ] = None,
    model: Model = "smollm2",
    method: MethodName = "fourier",
    budget: Budget = None,
    profile: ProfilePath = None,
    measure: Measure = True,
    extend_to: ExtendTo = None,
    extend_rule: ExtendRule = None,
    option: OptionList = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")] = True,
    prefill_chunk: PrefillChunk = None,
    graph: Annotated[
        bool | None,
        typer.Option("--graph/--no-graph", help="Decode by a CUDA graph, or not; otherwise on CUDA where it can be."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fuse the layers of a graph by torch.compile: slow to begin, faster then.")
    ] = False,
    diffusion: diffuse.Diffusion = False,
    block_length: diffuse.BlockLength = None,
    steps: diffuse.Steps = None,
    threshold: diffuse.Threshold = None,
    keep: diffuse.Keep = None,
    refresh: diffuse.Refresh = None,
    sampler: diffuse.SamplerOptions = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer a prompt, with a report of the bytes held and of the time taken."""
    with user_errors("run the command again; a text that --save-prefix kept is not read again with --prefix"):
        diffuse.check_options(ctx, diffusion, keep)
        kept = check_prefix(ctx, prompt, file, save_prefix, save_size, prefill_chunk, prefix)
        parts = [read_document(file)] if file else []
        parts += [prompt] if prompt and prompt.strip() else []
        if not parts:
            raise ValueError("the prompt is empty: give a PROMPT, a --file, or both")
        if diffusion:
            of_sampler = diffuse.sampler_options(sampler, temperature=temperature, top_k=top_k, top_p=top_p)
            wanted = diffuse.Wanted(max_new_tokens, block_length, steps, threshold, keep, refresh, seed, of_sampler)
            how = (method if diffuse.given(ctx, "method") else "dense", parse_options(option), budget, profile)
            source = Source(model, device, dtype, extend_to, extend_rule)
            diffuse.show(diffuse.answer(source, "\n\n".join(parts), chat, wanted, how), as_json)
            return
        choice = told(temperature, top_k, top_p, prefill_chunk)
        chosen = read_method(method, option, budget, dtype)
        import torch
        from transformers import TextStreamer

        import longwave
        from longwave.decode.steps import Unsupported
        from longwave.frame import cache_argument
        from longwave.plan.profile import Profile
        from longwave.saved.look import bound_of

        measured = Profile.load(profile) if profile is not None else None
        source = Source(model, device, dtype, extend_to, extend_rule)
        check_loop(why_python(source.device, graph), graph, compiled)
        held = 0  # tokens of the prompt that a saved prefix has
        first = None  # of the prompt what is read before the rest, in passes of its own
        if kept is not None:
            held = kept.tokens
            encoded = as_input(prompt_ids(source.tokenizer, parts[-1], is_chat(kept)))
        elif save_prefix is not None:
            first = prefix_ids(source.tokenizer, parts[0], chat)
            encoded = as_input(first, prompt_ids(source.tokenizer, parts[1], chat))
        else:
            encoded = encode(source.tokenizer, "\n\n".join(parts), chat)
        count = held + encoded["input_ids"].shape[1]
        coming = count + max_new_tokens - 1  # the last new token is not read
        decided = kept is not None and kept.kind == "exact"
        bound = bound_of(kept.path) if decided else source.check(chosen, budget, coming)
        if bound and bound.needs.look and kept is None and first is None and len(parts) == 2:
            first, question = prefix_ids(source.tokenizer, parts[0], chat), prompt_ids(source.tokenizer, parts[1], chat)
            encoded = as_input(first, question)
            count = encoded["input_ids"].shape[1]
            coming = count + max_new_tokens - 1
            if question.shape[1] > bound.needs.look:
                say(f"a question of {question.shape[1]:,} tokens is not looked for: look={bound.needs.look:,}")
        prefill_chunk = source.check_length(count, max_new_tokens, bound, prefill_chunk)
        if prefill_chunk is not None:
            choice["prefill_chunk_size"] = prefill_chunk
        loaded, tokenizer = source.load(), source.tokenizer
        memory: Any = None if decided else source.cache(loaded, chosen, budget, measured, coming, measure)
        if prefix is not None:
            memory, before = longwave.restore(loaded, prefix, memory, tokenizer=tokenizer)
            encoded = as_input(before, encoded["input_ids"])
        coder = None if save_size is None else coder_for(memory, loaded, tokenizer, save_size)
        encoded = {name: x.to(source.device) for name, x in encoded.items()}
        why = why_python(source.device, graph) or longwave.decode.supports(loaded, memory)
        check_loop(why, graph, compiled)
        torch.manual_seed(seed)
        streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        if loaded.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(loaded.device)
        clock = Clock(loaded.device)
        given: dict[str, Any] = cache_argument(loaded, memory)
        loop = loop_of(loaded, why, compiled)
        try:
            with reading(loaded, count - held, prefill_chunk) as done:
                if save_prefix is not None:
                    keep_prefix(loaded, memory, first, save_prefix, save_size, coder, prefill_chunk, {"chat": chat})
                elif first is not None:
                    read_prefix(loaded, memory, first, prefill_chunk)
                out = loop(
                    **encoded,
                    **given,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    logits_processor=[Read(done)],
                    stopping_criteria=[clock],
                    pad_token_id=tokenizer.pad_token_id,
                    **going_on(loaded, memory, encoded["input_ids"], choice),
                )
        except Unsupported as error:  # seen late: much of the answer may be out
            raise ValueError(f"{error}: {'leave out --compile' if compiled else 'pass --no-graph'}") from error
        pace = {"loop": "python" if why else "graph", "loop_reason": why, **clock.read(out.shape[1] - count)}
        pace |= {"dtype": named(loaded.dtype), "device": str(loaded.device)}
        if as_json:
            answer = tokenizer.decode(out[0, count:], skip_special_tokens=True)
            show_json({"text": answer, "prompt_tokens": count, "seed": seed, **pace, **memory.report().as_dict()})
        else:
            for line in (show_pace(pace), str(memory.report())):
                say(line)


def check_loop(why: str | None, graph: bool | None, compiled: bool) -> None:
    """Raise ValueError where a graph was asked for that cannot be."""
    if graph and why:
        raise ValueError(f"--graph: {why}")
    if compiled and why:
        raise ValueError(f"--compile is for the steps of a graph, and there is none: {why}")


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
        f"decoded by {pace['loop']}{reason} in {pace['dtype']} on {pace['device']}",
    ]
    if "peak_memory" in pace:
        parts.append(f"peak memory {pace['peak_memory']:,} bytes")
    return ", ".join(parts)
