"""`longwave.restore`: a cache from a file, as it was, or its K and V settled into any method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave import build
from longwave.codec import codec_for, kept_codec
from longwave.codec.coder import Coder
from longwave.frame import LongCache, assemble, stored_dtype
from longwave.frame.observe import Queries
from longwave.frame.parked import give_states
from longwave.methods import Bound, Method
from longwave.saved.binding import unpack
from longwave.saved.coded import Coded
from longwave.saved.container import Reader, SavedCacheError
from longwave.saved.identity import check_identity
from longwave.saved.look import where
from longwave.saved.saving import coder_at
from longwave.saved.settling import Prompt, device_of, prompt_of, settle_into
from longwave.shape import CacheShape, check_supported
from longwave.store.state import State, within


def restore(
    model: PreTrainedModel,
    path: str | Path,
    method: str | Method | Bound | LongCache | None = None,
    budget: float | str | None = None,
    *,
    coder: Coder | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> tuple[LongCache, torch.Tensor]:
    """(cache, ids) of a file that `save` wrote: the cache goes on as if it had just read ids [batch, columns].

    method, budget, options: as in `longwave.cache`, for K and V to be settled into it, layer after layer, as a prompt
        is. Or an empty cache of the model, to be filled. Without a method an exact file comes back as it was, a coded
        one dense.
    coder: what the file was coded with, the model's own where none is given; where that is not kept here it is fitted
        again, once all is checked that can be without it. tokenizer: of the model, for that and for measuring it.

    ids are int64 on the model's device, with those that were saved beyond what was read; `cache.mask()` says which
    columns are padding. Raises SavedCacheError, a ValueError, for a file that is cut, damaged, foreign or of another
    version, model or codec; ValueError for a method that needs of the text what the file does not hold. Then nothing is
    changed.
    """
    path = Path(path)
    if method is None and (budget is not None or options):
        given = ", ".join([*(["budget"] if budget is not None else []), *options])
        raise ValueError(f"{given} decides nothing without a method: give method= as well, or leave it out")
    if isinstance(method, LongCache):
        _check_empty(model, method, budget, options)
    shape = CacheShape.of(check_supported(model), stored_dtype(model.dtype, model.device.type))
    with open(path, "rb") as file:
        reader = Reader(file, path, where)
        facts = reader.facts
        check_identity(model, shape, facts["model"], path)
        tensors = reader.tensors()
    states = [{**state, **within(f"layers.{index}", tensors)} for index, state in enumerate(facts["layers"])]
    ids = tensors["ids"].to(model.device)
    with _model_as_it_was(model):
        if facts["kind"] == "exact":
            cache = _exact(model, shape, facts, tensors, states, path)
            if method is not None:
                cache = _settled(
                    model, method, budget, tokenizer, options, prompt_of(cache, tensors["ids"], states, path)
                )
        else:
            if coder is None and (kept := kept_codec(model)) is not None:
                coder = coder_at(kept, model.device)
            coded = Coded(facts, tensors, coder, lambda: coder_at(codec_for(model, tokenizer), model.device), path)
            prompt = _coded_prompt(coded, facts, tensors["ids"], states, path)
            cache = _settled(model, method or "dense", budget, tokenizer, options, prompt)
    return cache, ids


def _check_empty(model: PreTrainedModel, cache: LongCache, budget: Any, options: Mapping[str, Any]) -> None:
    if budget is not None or options:
        raise ValueError("budget and options were decided when the cache was built: leave them out")
    if cache.origin() is not model or cache.get_seq_length():
        raise ValueError("a cache to restore into is an empty one of the same model: longwave.cache(model, ...)")


def _exact(
    model: PreTrainedModel,
    shape: CacheShape,
    facts: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    states: list[State],
    path: Path,
) -> LongCache:
    try:
        bound = unpack(facts["plan"], tensors)
        if bound.shape != shape:
            raise ValueError(f"its method was bound to {bound.shape}")
        bound.method.check(model.device)
        made = assemble(model, bound.layer, bound.needs, bound)
        for layer in made.memory_layers():
            layer.max_tokens, layer.max_rows = facts["limits"]
        if len(states) != len(made.layers):
            raise ValueError(f"it has {len(states)} layers, and this model {len(made.layers)}")
        devices = [device_of(model, index) for index in range(len(states))]
        moved = [
            {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in state.items()}
            for state, device in zip(states, devices, strict=True)
        ]
        give_states(made.layers, moved, list(devices))
        for layer in made.memory_layers():
            layer.check_kept(shape.kv_heads, shape.head_dim)
            if layer.columns != facts["tokens"] or layer.rows != facts["rows"]:
                raise ValueError(f"layer {layer.index} has {layer.rows} tokens, the file {facts['rows']}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SavedCacheError(f"{path} cannot be restored: {error}") from error
    return made


def _settled(
    model: PreTrainedModel, method: Any, budget: Any, tokenizer: Any, options: Mapping[str, Any], prompt: Prompt
) -> LongCache:
    if isinstance(method, LongCache):
        return _filled(model, method, prompt)
    empty = build.cache(model, method, budget, tokenizer=tokenizer, **options)
    build.expect(model, empty, prompt.mask.shape[1], prompt.mask.shape[0])
    settle_into(model, empty, prompt)
    return empty


def _filled(model: PreTrainedModel, empty: LongCache, prompt: Prompt) -> LongCache:
    try:
        settle_into(model, empty, prompt)
    except BaseException:
        empty.reset()
        raise
    return empty


def _coded_prompt(coded: Coded, facts: Mapping[str, Any], ids: torch.Tensor, states: list[State], path: Path) -> Prompt:
    columns = facts["tokens"]
    mask = torch.arange(columns) >= columns - torch.tensor(coded.rows)[:, None]
    memory = [state for state in states if "scaling" in state]  # transformers' own layers have none
    kept = [within("queries", state) for state in memory]
    return Prompt(ids, mask, states, coded.layer, [Queries.of_state(x) if x else None for x in kept], path)


@contextmanager
def _model_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Where this fails the model attends as before: a cache selects our attention on it."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    try:
        yield
    except BaseException:
        if text._attn_implementation != before:
            nested = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
            model.set_attn_implementation({nested[0]: before} if nested else before)
        raise
