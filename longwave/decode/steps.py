"""`StaticDecoder`: steps over storage that stays where it is.

A step is one forward pass with one new token a row. Shapes are those of the reserved storage; how much of it counts is
read from small tensors on the device, which the step itself advances. Between steps the host, which counts along,
knows when a layer has something to settle. Every layer has its own counts. docs/decoding.md tells more.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext, suppress
from typing import Any

import torch
from transformers import Cache, GenerationMixin, PreTrainedModel

from longwave.decode.compiled import Compiled, OpaqueCache, Uncompiled, layers_of
from longwave.decode.graph import Graph
from longwave.decode.sliding import SlidingStep, why_not
from longwave.frame import LongCache, MemoryLayer, Pass, Step, cache_name
from longwave.frame.attention import Handle, LogicalLength, StepMask, is_ours, own_arithmetic
from longwave.frame.hidden import take_hidden
from longwave.frame.standin import StandIn
from longwave.shape import learns_sinks

MEMORY = "storage for all new tokens is reserved at once: fewer of them, or fewer rows, need less"


class Unsupported(ValueError):
    """What steps, or a graph of them, cannot do, and model.generate can."""


def supports(model: PreTrainedModel, cache: Cache) -> str | None:
    """Why `StaticDecoder` cannot step this model with this cache (empty or filled), or None if it can."""
    if not isinstance(cache, LongCache):
        return f"the cache is a {type(cache).__name__}, not one made by longwave.cache"
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or [None] * len(cache.layers)
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, MemoryLayer):
            reason = why_not(layer, kinds[index])
            if reason:
                return f"layer {index} {reason}"
            continue
        reason = layer.unsteady()
        if reason:
            return f"{cache.method}: {reason}"
        if layer.record_past:
            return "the cache records its past for assisted decoding"
    mixed = any(not isinstance(layer, MemoryLayer) for layer in cache.layers)
    if mixed and not next(cache.memory_layers()).unbroken:
        return "rows have padding between their tokens, and which columns of a sliding layer are real is not known"
    implementation = getattr(config, "_attn_implementation", None)  # private, of transformers
    if not is_ours(implementation):
        return f'the model attends by "{implementation}": longwave.cache(model, ...) selects ours'
    if learns_sinks(model):
        return "it learns attention sinks, which steps do not apply yet"
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


class _StepLayer(StandIn):
    """What the model sees of a memory layer during a step: it writes where the device says and answers from there."""

    def __init__(self, layer: MemoryLayer, step: Step):
        super().__init__()
        self.layer, self.step = layer, step

    def update(  # type: ignore[override]  # as in MemoryLayer
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        self.layer.check_finite(key_states, value_states)
        return super().update(key_states, value_states)

    def forward(
        self,
        q: torch.Tensor,
        scaling: float,
        mask: object,
        module: Any = None,
        positions: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert sinks is None  # `supports` has seen to it
        if not isinstance(mask, StepMask):
            raise Unsupported(
                "cannot decode in steps: the model hides tokens by masks of its own. model.generate works"
            )
        k, v = self.take()
        rotary = self.layer.progress.rotary
        p = Pass(q, k, v, scaling, module=module, positions=self.step.positions, rotary=rotary, phase="step")
        if self.layer.needs.hidden:
            p.hidden = take_hidden(module)
        return self.layer.run_step(p, self.step)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return LogicalLength(query_length), 0  # what a row sees is counted on the device


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
        check_room(first, first.columns, new_tokens)
        device = first.device
        if graph and device.type != "cuda":
            raise ValueError(f"graph=True needs CUDA, and the cache lies on {device}")
        self.model, self.cache, self.new_tokens = model, cache, new_tokens
        self.captures = device.type == "cuda" if graph is None else graph
        if compile:
            check_compiles(model)
        self._compiled = Compiled(model) if compile else None
        self.steps = 0  # taken
        self._layers, self._gangs = layers, _gangs(layers)
        batch = first.batch_size
        where = first.rows if positions is None else positions
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.as_tensor(where, dtype=torch.long).reshape(batch, 1).to(device, copy=True)
        # what every layer counts, in one tensor of a kind, so that a step advances all of them at once
        self._at = torch.zeros(len(layers), batch, dtype=torch.long, device=device)
        self._seen = torch.zeros(len(layers), batch, 1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(len(layers), batch, dtype=torch.int32, device=device)
        self._total = torch.zeros(batch, dtype=torch.long, device=device)
        self._live = torch.ones(batch, dtype=torch.bool, device=device)
        rows = torch.arange(batch, device=device)
        steps = [
            Step(rows, at, seen, counts, self._total, self.positions, self._live)
            for at, seen, counts in zip(self._at, self._seen, self._counts, strict=True)
        ]
        self._sliding: list[SlidingStep] = []
        mine = iter(_StepLayer(*pair) for pair in zip(layers, steps, strict=True))
        self._name = cache_name(model)
        self._graph: Graph | None = None
        self._logits: torch.Tensor | None = None
        self._key = cache._progress.lent = object()
        try:
            for layer in layers:
                layer.reserve(new_tokens)
                if layer.queries is not None:
                    layer.queries.reserve()
            for layer in cache.layers:
                if not isinstance(layer, MemoryLayer):
                    self._sliding.append(SlidingStep(layer, first.rows, first.columns))
        except BaseException as error:
            self.finish()
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(MEMORY)
            raise
        rings = iter(self._sliding)
        self._cache = OpaqueCache(
            layers=[next(mine if isinstance(layer, MemoryLayer) else rings) for layer in cache.layers]
        )
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
            self._logits = self._graph.logits
        self.steps += 1
        self._settle()
        return self._logits

    def finish(self) -> None:
        """Hand the cache back as ordinary decoding would have left it. A second call does nothing.

        Where a layer fails, out of memory, the others are still released; the first error is raised then.
        """
        self._graph = self._logits = None
        if self._compiled is not None:
            self._compiled.close()
        if self.cache._progress.lent is not self._key:
            return
        self.cache._progress.lent = None
        failed: BaseException | None = None
        if not self.cache._progress.broken:  # else layers differ, and only reset() helps
            for gang in self._gangs:
                gang.tell()
            for ring in self._sliding:
                try:
                    ring.release(self.steps)
                except BaseException as error:
                    self.cache._progress.broken, failed = True, failed or error
        for layer in self._layers:
            try:
                with own_arithmetic(layer.device.type):
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
        for count in (self.positions, self._at, self._seen, self._total):
            count += 1
        return logits

    def _capture(self) -> None:
        states = [self.positions, self._at, self._seen, self._total]
        states += [state for layer in self._layers for state in layer.step_state()]
        states += [state for ring in self._sliding for state in ring.states]
        self._live.fill_(False)  # warming up: nothing is evicted, and what is written behind the rows' ends is again
        try:
            self._graph = Graph(self._run, states, self._live)
        finally:
            self._live.fill_(True)

    def _settle(self) -> None:
        """Count the step, and settle what it made due, as `MemoryLayer.forward` does after a pass."""
        settled = False
        for gang in self._gangs:
            gang.step()
            if not gang.lead.ripe():
                continue
            settled = True
            gang.tell()
            try:
                with own_arithmetic(gang.lead.device.type):
                    for layer in gang.layers:
                        layer.settle()
            except BaseException:
                self.cache._progress.broken = True
                raise
        if not settled:
            return
        if self._addresses() != self._storage:
            self.cache._progress.broken = True
            raise RuntimeError(
                "reserved storage moved: was the decoder made under torch.inference_mode() and used outside?"
            )
        self._tell_device()

    def _tell_device(self) -> None:
        held = [gang.lead.dense.lengths for gang in self._gangs for _ in gang.layers]
        pages = [gang.lead.page_counts() for gang in self._gangs for _ in gang.layers]
        order = [layer.index for gang in self._gangs for layer in gang.layers]
        place = [order.index(layer.index) for layer in self._layers]
        lengths = torch.tensor(held)[place]
        self._at.copy_(lengths)
        self._seen.copy_(lengths[..., None] + 1)
        self._counts.copy_(torch.tensor(pages)[place])
        self._total.copy_(torch.tensor(self._layers[0].rows))

    def _addresses(self) -> list[int]:
        """Where the storage lies that a step reads and writes."""
        return [t.data_ptr() for layer in self._layers for tensors in layer.parts().values() for t in tensors]


class _Gang:
    """Layers that hold and count alike: the first of them counts every step, the others are told when it matters."""

    def __init__(self, layers: list[MemoryLayer]):
        self.lead, self.layers, self._behind = layers[0], layers, 0

    def step(self) -> None:
        self.lead.stepped(1)
        self._behind += 1

    def tell(self) -> None:
        for layer in self.layers[1:]:
            layer.stepped(self._behind)
        self._behind = 0


def _gangs(layers: list[MemoryLayer]) -> list[_Gang]:
    found: dict[Any, list[MemoryLayer]] = {}
    for layer in layers:
        own = type(layer).count_steps is not MemoryLayer.count_steps  # it evicts by a rule of its own
        key = layer.index if own else (type(layer), tuple(layer.dense.lengths), tuple(layer.page_counts()))
        found.setdefault(key, []).append(layer)
    return [_Gang(alike) for alike in found.values()]


def check_compiles(model: PreTrainedModel) -> None:
    if not layers_of(model):
        raise Unsupported(
            f"compile=True: transformers marks no layers in {type(model).__name__} that could be compiled"
        )


def check_room(layer: MemoryLayer, held: int, new: int) -> None:
    if layer.max_tokens is not None and held + new > layer.max_tokens:
        raise ValueError(
            f"the byte budget of this cache was computed for {layer.max_tokens} tokens, and {held} with {new} new ones "
            "do not fit. Build it with a larger max_tokens, or ask for fewer new tokens"
        )
