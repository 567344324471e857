"""K and V that are known already, settled into a method as a prompt is: one layer after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.frame import LongCache, MemoryLayer, Needs, cache_argument, observing
from longwave.frame.attention import own_arithmetic
from longwave.frame.beside import Beside
from longwave.frame.observe import Queries
from longwave.frame.others import load_own_state
from longwave.saved.coded import whole
from longwave.store.state import within


@dataclass
class Prompt:
    """What was read, and where its K and V come from.

    ids int64 [batch, columns], mask bool alike. facts, states: of every layer of the model, by index: what was counted,
    and everything that transformers' own keep. layer: (number of a memory layer, device) -> K and V [batch, kv_heads,
    longest, head_dim]. queries: what was remembered of each memory layer, where anything was. path: for errors.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    states: list[dict[str, Any]]
    layer: Callable[[int, torch.device], tuple[torch.Tensor, torch.Tensor]]
    queries: list[Queries | None]
    path: Any


def prompt_of(cache: LongCache, ids: torch.Tensor, states: list[Any], path: Any) -> Prompt:
    """What a cache holds as what another method settles: see `Prompt`. ValueError where K and V are not to be had."""
    try:
        whole(cache)
    except ValueError as error:
        raise ValueError(f"{path} cannot be settled into another method, restore it without one: {error}") from error
    layers = list(cache.memory_layers())
    return Prompt(
        ids, cache.mask(), states, lambda i, device: layers[i].materialize(), [x.queries for x in layers], path
    )


def device_of(model: PreTrainedModel, index: int) -> torch.device:
    """Where a model's layer lies; models may be split."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == index:
            for x in module.parameters():
                return x.device
    return model.device


def check_needs(empty: LongCache, path: Any) -> Needs:
    """What a method needs of a prompt that a file holds. ValueError where no file does."""
    needs = next(empty.memory_layers()).needs
    if needs.in_passing:
        what = "the input of each layer" if needs.hidden else "the attention that each token got"
        what = "how little each token was expected" if needs.surprise else what
        raise ValueError(
            f"{empty.method} needs {what} while the text was read, and {path} does not hold that: let the model read "
            "the text again, or restore into dense, fourier, kivi, snapkv, streaming or quest"
        )
    return needs


def can_settle(cache: LongCache, needs: Needs) -> bool:
    """Whether all that `needs` names of a text can be had from the K and V of a cache that has read it."""
    return not needs.in_passing and (not needs.queries or _goes_back(cache))


def _goes_back(cache: LongCache) -> bool:
    """Whether no layer has moved on from where last tokens could be read once more."""
    return all(isinstance(layer, MemoryLayer) and not isinstance(layer, Beside) for layer in cache.layers)


def settle_into(model: PreTrainedModel, empty: LongCache, prompt: Prompt) -> None:
    """Fill an empty cache of any method. ValueError where the method needs of the prompt what nobody knows any more."""
    needs = check_needs(empty, prompt.path)
    limit = next(empty.memory_layers()).max_tokens
    if limit is not None and prompt.mask.shape[1] > limit:
        raise ValueError(f"{prompt.path} holds {prompt.mask.shape[1]:,} tokens, and max_tokens is {limit:,}: give more")
    queries = prompt.queries
    if needs.queries and not all(held is not None and held.covers(needs) for held in queries):
        queries = _ask_again(model, needs, prompt)
    for position, layer in enumerate(_filling(model, empty, prompt)):
        state = prompt.states[layer.index]
        k, v = prompt.layer(position, layer.device)
        own, columns = queries[position], {}
        if layer.needs.ids:
            columns["token"] = _in_rows(prompt, k.shape[2]).to(layer.device)
        if own is not None and needs.queries:
            own.move(layer.device)
        with own_arithmetic(layer.device.type):
            layer.take(k, v, list(state["rows"]), state["scaling"], columns, own if needs.queries else None)
        _count(layer, state)


def _in_rows(prompt: Prompt, longest: int) -> torch.Tensor:
    """The ids as rows hold them, without padding: int64 [batch, 1, longest]."""
    made = torch.zeros(len(prompt.mask), 1, longest, dtype=torch.long)
    for row, real in enumerate(prompt.mask):
        own = prompt.ids[row, : len(real)][real]
        made[row, 0, : len(own)] = own
    return made


def _filling(model: PreTrainedModel, cache: LongCache, prompt: Prompt) -> Any:
    """The memory layers of a cache, one after the other, with their devices; all that lies beside them is put back."""
    for index, layer in enumerate(cache.layers):
        device, state = device_of(model, index), prompt.states[index]
        if not isinstance(layer, MemoryLayer):
            load_own_state(layer, _on(state, device), device)
            continue
        layer.device = device
        if isinstance(layer, Beside):
            layer.load_beside(_on(within("beside", state), device), device)
        yield layer


def _on(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in state.items()}


def _count(layer: MemoryLayer, state: Mapping[str, Any]) -> None:
    """Columns, padding included, as they were when the text was read."""
    layer.columns, layer._run, layer._beyond = state["columns"], list(state["run"]), state["beyond"]
    layer._came = None if state["came"] is None else (state["came"][0], state["came"][1])


@torch.no_grad()
def _ask_again(model: PreTrainedModel, needs: Needs, prompt: Prompt) -> list[Queries | None]:
    """The queries of the last tokens: the model reads these once more, over the K and V of those before them.

    All layers are dense while it reads. ValueError where layers of other kinds have moved on by then.
    """
    dense = observing(model, Needs(queries=needs.queries, every=needs.every))
    if not _goes_back(dense):
        raise ValueError(
            f"the method needs queries of the last tokens, {prompt.path} has none, and this model's sliding or "
            "recurrent layers do not go back to where they could be asked again: save from a cache of "
            "that method, or read again"
        )
    columns = prompt.mask.shape[1]
    new = min(columns, (needs.queries + 1) * needs.every)
    rows = prompt.mask[:, : columns - new].sum(-1).tolist()
    if not any(rows):
        new = columns
    for position, layer in enumerate(_filling(model, dense, prompt)):
        if not any(rows):
            continue
        k, v = (x[:, :, : max(rows)] for x in prompt.layer(position, layer.device))
        state = prompt.states[layer.index]
        valid = None if min(rows) == max(rows) else torch.arange(max(rows)) < torch.tensor(rows)[:, None]
        layer.write(k, v, None if valid is None else valid.to(k.device))
        layer.dense.fit()
        layer.scaling = state["scaling"]
        layer.columns = columns - new
        layer._run = list(rows)
        if layer.queries is not None:
            layer.queries.seen = list(rows)
    positions = (prompt.mask.cumsum(-1) - 1).clamp(min=0)[:, columns - new :]
    more = {"attention_mask": prompt.mask.long().to(model.device)} if not bool(prompt.mask.all()) else {}
    device = model.device
    ids = prompt.ids[:, columns - new : columns].to(device)
    model(
        ids, **cache_argument(model, dense), use_cache=True, logits_to_keep=1, position_ids=positions.to(device), **more
    )
    return [layer.queries for layer in dense.memory_layers()]
