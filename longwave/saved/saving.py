"""`longwave.save`: a cache, and the ids that it has read, as one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longwave.budget import human, parse_budget
from longwave.codec import Codec, codec_for
from longwave.codec.coder import Coder
from longwave.frame import LongCache, MemoryLayer, stored_dtype
from longwave.frame.parked import states_of
from longwave.methods import Bound
from longwave.saved import container
from longwave.saved.binding import pack
from longwave.saved.coded import encode, ends_of, segments, whole
from longwave.saved.identity import identity
from longwave.shape import CacheShape, check_supported
from longwave.store.state import State

ENTRY = 256  # bytes that a tensor takes of a file's header at most


def save(
    cache: LongCache,
    ids: torch.Tensor,
    path: str | Path,
    *,
    exact: bool = False,
    size: float | str | None = None,
    coder: Coder | None = None,
    model: Any = None,
    tokenizer: Any = None,
    about: Mapping[str, Any] | None = None,
) -> int:
    """Write what a cache holds to a file that `restore` reads; the file's bytes.

    ids: integers [batch, columns or more], all that the cache has read, padding included; more of them are kept with it
        (`generate` gives one that is not read yet).
    exact: the method's own storage, bit for bit. size: or K and V coded: a fraction of what the middle takes in 16 bits
        ("5%", 0.05), or a size of the whole file ("20MiB"). Of a row the first 4 tokens stay exact, and the last 128
        are kept in 8 bits; one of no more than these stays exact.
    coder: what codes, `longwave.codec`'s own where none is given. model: the one that the cache was built on, where the
        cache does not know it (after unpickling). tokenizer: of the model, where a codec is to be fitted and it is not
        found where the model came from. about: what else to keep, of JSON.

    A parked cache can be saved. The file is a text in clear to whoever has the model; its owner alone may read it.
    Raises ValueError for what cannot be saved so, OSError for what the disk refuses; an old file at `path` stays then.
    """
    if exact == (size is not None):
        raise ValueError("say how to save: exact=True for the cache as it is, or size=0.05 for K and V coded")
    if coder is not None and exact:
        raise ValueError("coder decides nothing where exact=True: leave it out, or give size")
    container.check_place(path := Path(path))  # before a codec is fitted
    columns = _check(cache)
    ids = _check_ids(cache, ids, columns)
    model = cache.origin() if model is None else model
    if model is None:
        raise ValueError("the model that this cache was built on is not there any more: pass model=")
    shape = CacheShape.of(check_supported(model), stored_dtype(model.dtype, model.device.type))
    facts = facts_of(cache, model, shape, "exact" if exact else "coded", about)
    states = states_of(cache.layers)
    tensors = {"ids": ids}
    if exact:
        if not isinstance(cache.method, Bound):
            raise ValueError("this cache was not made by longwave.cache, so its method is not known: give size instead")
        first = next(cache.memory_layers())
        facts["limits"] = [first.max_tokens, first.max_rows]
        facts["plan"], plan = pack(cache.method)
        tensors |= plan
    else:
        whole(cache)
        cache.mask()  # ValueError where it is not known which ids are whose
        states = beside(cache)
    put_states(facts, tensors, states)
    if not exact:
        fraction, most = parse_budget(size)  # type: ignore[arg-type]  # given, as was checked
        coder = coder_at(codec_for(model, tokenizer), model.device, fraction) if coder is None else coder
        facts |= {"coder": coder.fingerprint.hex(), "segment": coder.tokens}
        tensors |= ends_of(cache, coder)
        tensors |= encode(cache, ids, coder, _room(facts, tensors, shape, coder, fraction, most))
    return container.write(path, facts, tensors)


def facts_of(
    cache: LongCache, model: Any, shape: CacheShape, kind: str, about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a file says of a cache."""
    report = cache.report()
    first = next(cache.memory_layers())
    return {
        "kind": kind,
        "model": identity(model, shape),
        "method": str(cache.method),
        "tokens": first.columns,
        "rows": list(first.rows),
        "held_nbytes": report.nbytes,
        "dense_nbytes": report.dense_nbytes,
        "about": dict(about or {}),
    }


def put_states(facts: dict[str, Any], tensors: dict[str, torch.Tensor], states: list[State]) -> None:
    """Have facts and tensors of a file say what each layer holds."""
    facts["layers"] = []
    for index, state in enumerate(states):
        facts["layers"].append({name: x for name, x in state.items() if not isinstance(x, torch.Tensor)})
        tensors |= {f"layers.{index}.{name}": x for name, x in state.items() if isinstance(x, torch.Tensor)}


def coder_at(codec: Codec, device: torch.device, fraction: float | None = None) -> Coder:
    """What codes at a fraction of the bytes in 16 bits; None leaves the sizes to whoever encodes."""
    return codec.at(max(codec.sizes) if fraction is None else fraction, device=device)


def _check(cache: LongCache) -> int:
    """Columns read; ValueError for a cache that cannot be trusted, or is empty."""
    if not isinstance(cache, LongCache):
        raise TypeError(f"a cache made by longwave.cache can be saved, got {type(cache).__name__}")
    if not cache._progress.parked:
        cache._progress.check()
        cache._progress.check_lent()
    columns = next(cache.memory_layers()).columns
    if not columns:
        raise ValueError("no token was read into this cache: there is nothing to save")
    return columns


def _check_ids(cache: LongCache, ids: torch.Tensor, columns: int) -> torch.Tensor:
    rows = len(next(cache.memory_layers()).rows)
    if (
        not isinstance(ids, torch.Tensor)
        or ids.is_floating_point()
        or ids.dtype == torch.bool
        or ids.ndim not in (1, 2)
    ):
        raise ValueError("ids are a tensor of whole numbers [batch, columns]: what the model was given")
    ids = ids.detach().reshape(-1, ids.shape[-1]).long().cpu()
    if ids.shape[0] != rows or ids.shape[1] < columns:
        raise ValueError(
            f"this cache has read {rows} rows of {columns:,} columns, and ids are {list(ids.shape)}: give all that was "
            "read, padding included"
        )
    return ids


def beside(cache: LongCache) -> list[State]:
    """What layers hold beside K and V: all of transformers' own; of memory layers what does not follow from the method:
    counts, queries, a recurrent state."""
    counts = ("columns", "rows", "run", "scaling", "came", "beyond")
    return [
        {name: x for name, x in state.items() if name in counts or name.startswith(("queries.", "beside."))}
        if isinstance(layer, MemoryLayer)
        else state
        for layer, state in zip(cache.layers, states_of(cache.layers), strict=True)
    ]


def share_of(fraction: float, tokens: int, shape: CacheShape) -> int:
    """Bytes: a fraction of what K and V of so many tokens take in 16 bits."""
    return int(fraction * tokens * len(shape.memory_layers) * shape.kv_heads * shape.head_dim * 2 * 2)


def _room(
    facts: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    shape: CacheShape,
    coder: Coder,
    fraction: float | None,
    most: int | None,
) -> int:
    """Bytes for all coded segments together."""
    todo = list(segments(facts["rows"], coder.tokens))
    middle = sum(stop - start for *_, start, stop in todo)
    if most is None:
        assert fraction is not None
        return share_of(fraction, middle, shape)
    rest = sum(x.nbytes for x in tensors.values()) + 2 * len(json.dumps(facts)) + ENTRY * (len(tensors) + len(todo) + 4)
    if most < rest + middle:  # less than a byte a token of all layers is nobody's code
        raise ValueError(
            f"{human(most)} is too little: what is not coded takes {human(rest)}, and {middle:,} tokens are; give "
            f"{human(rest + 64 * middle)} or so at least"
        )
    return most - rest
