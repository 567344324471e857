"""Decoding that Python does not hold up: steps over storage that stays where it is, on CUDA replayed as one graph.

A step is one forward pass with one new token a row. Shapes are those of the reserved storage; how much of it counts is
read from small tensors on the device, which the step itself advances. Between steps the host, which counts along,
knows when a segment is full and lets the layers compress it. docs/decoding.md tells more.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext, suppress
from dataclasses import fields
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from longwave.attention import NAME, Handle, LogicalLength, StepMask
from longwave.cache import LongCache, MemoryLayer
from longwave.compiled import Compiled, OpaqueCache, Uncompiled, layers_of
from longwave.ops.write import write_step

MEMORY = "storage for all new tokens is reserved at once: fewer of them, or fewer rows, need less"
WARM_UP = 3  # steps before the capture: kernels compile and libraries take their workspaces


class Unsupported(ValueError):
    """What steps, or a graph of them, cannot do, and model.generate can."""


def supports(model: PreTrainedModel, cache: Cache) -> str | None:
    """Why `StaticDecoder` cannot step this model with this cache (empty or filled), or None if it can."""
    if not isinstance(cache, LongCache):
        return f"the cache is a {type(cache).__name__}, not one made by longwave.cache"
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, MemoryLayer):
            return f"layer {index} keeps its past in transformers' own {type(layer).__name__}, whose storage moves"
        reason = layer.unsteady()
        if reason:
            return f"{cache.method}: {reason}"
        if layer.record_past:
            return "the cache records its past for assisted decoding"
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != NAME:
        return f'the model attends by "{config._attn_implementation}": longwave.cache(model, ...) selects ours'
    if model.training:
        return "the model is in training mode: call model.eval()"
    own: Any = type(model)
    if own.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return f"{type(model).__name__} prepares the inputs of a step in its own way"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return f"its rotary embedding ({rope['rope_type']}) changes with the length, step by step"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices"
    return None


class _StepLayer(CacheLayerMixin):
    """What the model sees of a memory layer during a step: it writes where the device says and answers from there."""

    def __init__(
        self, layer: MemoryLayer, rows: torch.Tensor, at: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor
    ):
        super().__init__()
        self.layer = layer
        self.rows, self.at, self.seen, self.counts = rows, at, seen, counts  # the decoder's own

    def update(  # type: ignore[override]  # as in MemoryLayer
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        self.layer.check_finite(key_states, value_states)
        k, v = self.layer.dense.tensors()
        write_step(k, v, key_states, value_states, self.rows, self.at)
        handle = Handle(self)
        return handle, handle

    def forward(self, q: torch.Tensor, scaling: float, mask: object) -> torch.Tensor:
        if not isinstance(mask, StepMask):
            raise Unsupported(
                "cannot decode in steps: the model hides tokens by masks of its own. model.generate works"
            )
        return self.layer.attend_step(q, scaling, self.seen, self.counts)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a step's layer has its storage already")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return LogicalLength(query_length), 0  # what a row sees is counted on the device

    def get_seq_length(self) -> int:
        return 0  # as get_mask_sizes says: a model that makes a mask of this makes one of the new token

    def get_max_length(self) -> int:
        return -1


class StaticDecoder:
    """Steps of a model with a filled `LongCache`, one new token a row each.

        with StaticDecoder(model, cache, new_tokens=100) as decoder:
            logits = decoder.step(ids)

    Takes the cache's storage over and hands it back in `finish`, at the latest when the decoder is collected; until
    then every other use of the cache but its bytes and `reset` is an error, and its report counts tokens as of the last
    compression.

    new_tokens: how many steps storage is reserved for.
    graph: whether a step is captured and replayed as a CUDA graph. None: on CUDA. Elsewhere the same step runs as it
        is. The capture is part of the first step.
    compile: whether the layers go through torch.compile: fewer launches, rounded elsewhere, so that logits differ in
        their last bits. Part of the first step too, and takes a while.
    positions: of the next token, integers [B] or [B, 1]. None: the tokens that each row of the cache holds.

    Raises Unsupported, a ValueError, where `supports` gives a reason, and ValueError where the cache is empty or its
    byte budget has no room for new_tokens, and for graph=True without CUDA.
    """

    _key: object | None = None  # the cache's `lent` while this decoder holds it

    def __init__(
        self,
        model: PreTrainedModel,
        cache: LongCache,
        *,
        new_tokens: int,
        graph: bool | None = None,
        compile: bool = False,
        positions: torch.Tensor | None = None,
    ):
        reason = supports(model, cache)
        if reason:
            raise Unsupported(f"cannot decode in steps: {reason}. model.generate works")
        if new_tokens < 1:
            raise ValueError(f"new_tokens is the number of steps to come, at least 1; got {new_tokens}")
        layers: list[MemoryLayer] = list(cache.memory_layers())
        first = layers[0]
        cache._progress.check()
        if not first.columns:
            raise ValueError("the cache is empty: let the model read the prompt first")
        for layer in layers:
            layer.crop(0)  # settles what a pass left open
        if len({(tuple(layer.dense.lengths), tuple(_counts(layer))) for layer in layers}) > 1:
            raise Unsupported(
                "cannot decode in steps: the layers hold different numbers of tokens. model.generate works"
            )
        _check_room(first, first.columns, new_tokens)
        device = first.device
        if graph and device.type != "cuda":
            raise ValueError(f"graph=True needs CUDA, and the cache lies on {device}")
        self.model, self.cache, self.new_tokens = model, cache, new_tokens
        self.captures = device.type == "cuda" if graph is None else graph
        if compile:
            _check_compiles(model)
        self._compiled = Compiled(model) if compile else None
        self.steps = self._told = 0  # taken; and those that the layers know of
        self._layers, self._lengths = layers, list(first.dense.lengths)
        batch = first.batch_size
        where = first.rows if positions is None else positions
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.as_tensor(where, dtype=torch.long).reshape(batch, 1).to(device, copy=True)
        self.rows = torch.arange(batch, device=device)
        self.at = torch.zeros(batch, dtype=torch.long, device=device)  # where the next token goes
        self.seen = torch.zeros(batch, 1, dtype=torch.int32, device=device)  # dense tokens once it is there
        self.counts = torch.zeros(batch, dtype=torch.int32, device=device)  # pages
        self._cache = OpaqueCache(
            layers=[_StepLayer(layer, self.rows, self.at, self.seen, self.counts) for layer in layers]
        )
        self._name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None
        self._key = cache._progress.lent = object()
        try:
            for layer in layers:
                layer.reserve(new_tokens)
        except BaseException as error:
            self.finish()
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(MEMORY)
            raise
        self._storage = self._addresses()
        self._tell_device()

    def __enter__(self) -> StaticDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def __del__(self, ending: Any = sys.is_finalizing) -> None:
        if self._key is not None and not ending():  # at Python's end nobody wants the cache, and torch may be gone
            with suppress(torch.OutOfMemoryError):  # storage then stays as large as it is
                self.finish()

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Read one token a row, integers [B] or [B, 1]; logits of the next one [B, vocabulary] in the model's dtype.

        With a graph the next step writes over the logits. Raises RuntimeError after `finish` or `new_tokens` steps, and
        Unsupported where the first step finds that the model cannot be captured or compiled, or makes masks of its own.
        """
        if self.cache._progress.lent is not self._key:
            raise RuntimeError("this decoder has handed its cache back: make another")
        if self.steps == self.new_tokens:
            raise RuntimeError(f"storage was reserved for {self.new_tokens} steps, and they are used up")
        self.ids.copy_(ids.reshape(self.ids.shape), non_blocking=True)
        if self.captures and self._graph is None:
            try:
                self._capture()
            except RuntimeError as error:
                full = error if isinstance(error, torch.OutOfMemoryError) else error.__context__  # ending may fail too
                if isinstance(full, torch.OutOfMemoryError):
                    full.add_note(MEMORY)
                    raise full from None
                raise Unsupported(
                    f"no CUDA graph could be made of a step of {type(self.model).__name__} ({error}). "
                    "graph=False steps without one, and model.generate works"
                ) from error
        if self._graph is None:
            self._logits = self._run()
        else:
            self._graph.replay()
        self.steps += 1
        self._lengths = [length + 1 for length in self._lengths]
        self._settle()
        assert self._logits is not None
        return self._logits

    def finish(self) -> None:
        """Hand the cache back as ordinary decoding would have left it. A second call does nothing.

        Where a layer fails, out of memory, the others are still released; the first error is raised then.
        """
        self._graph = self._logits = None
        if self.cache._progress.lent is not self._key:
            return
        self.cache._progress.lent = None
        if not self.cache._progress.broken:  # else layers differ, and only reset() helps
            self._tell_layers()
        failed: BaseException | None = None
        for layer in self._layers:
            try:
                layer.release()
            except BaseException as error:
                failed = failed or error
        if failed is not None:
            raise failed

    # inside

    def _run(self) -> torch.Tensor:
        """The step itself: device work alone, on tensors that stay where they are."""
        given = {"input_ids": self.ids, "position_ids": self.positions, self._name: self._cache}
        try:
            with nullcontext() if self._compiled is None else self._compiled.within():
                logits = self.model(**given, use_cache=True, return_dict=True).logits[:, -1]
        except Uncompiled as error:
            raise Unsupported(
                f"a step of {type(self.model).__name__} could not be compiled ({error}). compile=False steps without"
            ) from error
        for count in (self.positions, self.at, self.seen):
            count += 1
        return logits

    def _capture(self) -> None:
        states = (self.positions, self.at, self.seen)
        before = [state.clone() for state in states]
        with torch.cuda.device(self.ids.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        self._run()  # writes behind the rows' ends, where the first real step writes again
                        for state, was in zip(states, before, strict=True):
                            state.copy_(was)
            finally:  # whoever takes the storage back waits for what was written
                torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._run()
        self._graph = graph

    def _settle(self) -> None:
        """Compress what the last step made due, as `MemoryLayer.forward` does after a pass."""
        self._layers[0].dense.lengths = list(self._lengths)
        if not self._layers[0].ripe():
            return
        self._tell_layers()
        try:
            for layer in self._layers:
                layer.settle()
        except BaseException:
            self.cache._progress.broken = True
            raise
        if self._addresses() != self._storage:
            self.cache._progress.broken = True
            raise RuntimeError(
                "reserved storage moved: was the decoder made under torch.inference_mode() and used outside?"
            )
        self._lengths = list(self._layers[0].dense.lengths)
        self._tell_device()

    def _tell_layers(self) -> None:
        """Bring the layers' own counts up to date."""
        new, self._told = self.steps - self._told, self.steps
        for layer in self._layers:
            layer.dense.lengths = list(self._lengths)
            layer.columns += new
            layer.rows = [count + new for count in layer.rows]
            layer._run = [count + new for count in layer._run]

    def _tell_device(self) -> None:
        lengths = torch.tensor(self._lengths)
        self.at.copy_(lengths)
        self.seen.copy_(lengths[:, None] + 1)
        self.counts.copy_(torch.tensor(_counts(self._layers[0])))

    def _addresses(self) -> list[int]:
        """Where the storage lies that a step reads and writes."""
        return [
            t.data_ptr() for layer in self._layers for t in (*layer.dense.tensors(), *layer.parts().get("pages", ()))
        ]


def _check_compiles(model: PreTrainedModel) -> None:
    if not layers_of(model):
        raise Unsupported(
            f"compile=True: transformers marks no layers in {type(model).__name__} that could be compiled"
        )


def _check_room(layer: MemoryLayer, held: int, new: int) -> None:
    if layer.max_tokens is not None and held + new > layer.max_tokens:
        raise ValueError(
            f"the byte budget of this cache was computed for {layer.max_tokens} tokens, and {held} with {new} new ones "
            "do not fit. Build it with a larger max_tokens, or ask for fewer new tokens"
        )


def _counts(layer: MemoryLayer) -> list[int]:
    """Pages of each row."""
    store = getattr(layer, "store", None)
    return [0] * layer.batch_size if store is None else list(store.counts)


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    graph: bool | None = None,
    compile: bool = False,
    **options: Any,
) -> Any:
    """`model.generate` with a `LongCache`, its steps taken by a `StaticDecoder`: same arguments, same answer.

    `past_key_values` (or `cache`) is the LongCache; the most new tokens decide the storage that is reserved. graph and
    compile: as in `StaticDecoder`.

    Raises Unsupported, a ValueError, for what only model.generate does: what `supports` names, beams and other modes
    than greedy and sampling, assistants, custom_generate, synced_gpus, token_healing, use_cache=False, attentions and
    hidden states as outputs, and model inputs that a step would need again. All this before the prompt is read; errors
    that come later, such as a step that cannot be captured, have a note that the cache holds it.
    """
    cache = options.get("cache", options.get("past_key_values"))
    if cache is None:
        raise ValueError("longwave.generate needs a cache: pass past_key_values=longwave.cache(model, ...)")

    def asked(name: str) -> Any:
        """An option as model.generate takes it: from its arguments, then the config given, then the model's own."""
        found = [getattr(config, name) for config in (generation_config, model.generation_config) if config is not None]
        return options.get(name, next((value for value in found if value is not None), None))

    reason = supports(model, cache)
    for name in ("assistant_model", "custom_generate", "synced_gpus"):
        reason = reason or (f"{name} changes the loop" if options.get(name) else None)
    if asked("token_healing"):
        reason = reason or "token_healing rewrites the prompt's last token"
    if reason:
        raise Unsupported(f"longwave.generate cannot do this: {reason}. model.generate works")
    if graph and model.device.type != "cuda":
        raise ValueError(f"graph=True needs CUDA, and the model is on {model.device}")
    if compile:
        _check_compiles(model)
    steps = {"graph": graph, "compile": compile}
    # transformers keeps these two to its own loops
    streamer, tokenizer, strings = options.get("streamer"), options.pop("tokenizer", None), asked("stop_strings")
    if strings is not None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={strings!r} need a tokenizer: pass tokenizer=...")
        given = options.get("stopping_criteria") or ()
        options["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, strings)])
        options["stop_strings"] = None

    def loop(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Any:
        return _loop(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, steps, inputs)

    return model.generate(inputs, generation_config, custom_generate=loop, **options)  # type: ignore[operator]


# what a step is given, or may go without once the prompt is read
_KNOWN = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds"}


def _loop(
    model: Any,
    ids: Any,
    process: Any,
    stop: Any,
    config: Any,
    streamer: Any,
    steps: dict[str, Any],
    inputs: dict[str, Any],
) -> Any:
    """What `GenerationMixin._sample` does, token for token."""
    reasons = {
        f"{config.get_generation_mode().value} is not greedy or sampling": config.get_generation_mode()
        not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "it keeps attentions or hidden states": config.output_attentions or config.output_hidden_states,
        "it goes without a cache": not inputs.get("use_cache"),
    }
    for name, value in inputs.items():
        if name not in _KNOWN:
            reasons[f"a step might need {name} again"] = value is not None and value is not False
    for reason, applies in reasons.items():
        if applies:
            raise Unsupported(f"longwave.generate cannot do this: {reason}. model.generate works")

    name = "cache" if "cache" in inputs else "past_key_values"
    cache = inputs[name]
    mask = inputs.get("attention_mask")
    # tokens that the cache will hold after the prompt; transformers drops a mask of ones
    prompt = getattr(config, "_mask_length", ids.shape[1]) if mask is None else mask.shape[1]
    if ids.shape[1] and cache.get_seq_length() == ids.shape[1] == prompt:
        # transformers would read the prompt a second time
        raise ValueError("all of the prompt is in the cache already: cache.reset(), or cache.crop(-1), and ask again")
    longest = config.max_length if stop.max_length is None else stop.max_length
    if longest - ids.shape[1] > 1:  # the last new token is not read
        _check_room(next(cache.memory_layers()), prompt, longest - ids.shape[1] - 1)
    pad = config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stop)
    kept: dict[str, Any] = {
        "scores": () if config.return_dict_in_generate and config.output_scores else None,
        "logits": () if config.return_dict_in_generate and config.output_logits else None,
    }
    unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
    logits = model._prefill(ids, config, inputs).logits[:, -1]
    positions = inputs["position_ids"][:, -1:].expand(ids.shape[0], 1) + 1
    decoder: StaticDecoder | None = None
    try:
        with model._optimize_model_for_decode():
            while True:
                logits = logits.to(copy=True, dtype=torch.float32, device=ids.device)
                scores = process(ids, logits)
                for part, value in (("scores", scores), ("logits", logits)):
                    if kept[part] is not None:
                        kept[part] += (value,)
                if config.do_sample:
                    tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[:, 0]
                else:
                    tokens = scores.argmax(dim=-1)
                if ends:  # rows that are done go on with padding
                    tokens = tokens * unfinished + pad.to(ids.device) * (1 - unfinished)
                ids = torch.cat([ids, tokens[:, None]], dim=-1)
                unfinished = unfinished & ~stop(ids, kept["scores"])
                if streamer is not None:
                    streamer.put(tokens.cpu())
                if not bool(unfinished.any()):
                    break
                if decoder is None:
                    new = longest - ids.shape[1]
                    decoder = StaticDecoder(model, cache, new_tokens=new, positions=positions, **steps)
                logits = decoder.step(tokens)
    except Exception as error:
        error.add_note("the cache holds what was read: cache.reset() before you ask again")
        raise
    finally:
        if decoder is not None:
            decoder.finish()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return ids
    own = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
    return GenerateDecoderOnlyOutput(sequences=ids, **kept, **{own: cache})
