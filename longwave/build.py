"""`longwave.cache`: from a model, a method and a budget to an empty cache that fits them."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from longwave.budget import Room, bind_to_size, parse_budget
from longwave.checks import whole
from longwave.frame import LongCache, assemble, stored_dtype
from longwave.methods import Bound, Method, get_method
from longwave.methods.base import Unmeasured
from longwave.plan.automatic import profile_for, shipped
from longwave.plan.profile import Profile
from longwave.shape import CacheShape, check_supported, context_limit, holds_states


def cache(
    model: PreTrainedModel,
    method: str | Method | Bound = "fourier",
    budget: float | str | None = None,
    profile: Profile | str | Path | None = None,
    max_tokens: int | None = None,
    batch: int = 1,
    measure: bool = True,
    tokenizer: Any = None,
    **options: object,
) -> LongCache:
    """An empty cache for `longwave.generate` and `model.generate` (cache=), holding its memory as `method` does.

    method: a name (longwave.methods.METHODS) with its `options` as keywords, an instance, or what another cache of such
        a model is bound to (`cache.method`), which is taken as it is.
    budget: a fraction such as 0.25 of the dense bytes of the middle of the context, or a size such as "512MiB" for
        the whole cache of `batch` rows of `max_tokens`, prompt and new tokens; longer input is then refused. Without
        `max_tokens` it is `longwave.generate` that says what is coming, and else the model's context length. Of a
        method with host= it is a size of the device: what it has no room for lies where host says. None leaves it to
        the method.
    profile: a `Profile` or its path. None takes the one that ships with the package or was measured before; a model
        that has none is measured once, on text that ships too, in seconds on a GPU and a minute or so on a CPU, and the
        profile is kept under the user's cache folder ($LONGWAVE_HOME).
    measure: False for those who do not want that: the plan is then a safe one, and the report says so. tokenizer: of
        the model, where it is not to be found where the model came from.

    Selects longwave's attention function on the model (`model.set_attn_implementation`); its other uses go on as
    before. Warns where a method has to plan without a measurement of the model.
    Raises ValueError for options, budgets or profiles that do not fit, NotImplementedError for unsupported models.
    """
    config = check_supported(model)
    if isinstance(method, str):
        method = get_method(method, **options)
    elif not isinstance(method, (Method, Bound)):
        raise TypeError(f"method is a name or an instance such as longwave.Fourier(...), got {type(method).__name__}")
    elif options:
        raise ValueError(f"options belong in the method instance when one is given: {', '.join(options)}")
    (method.method if isinstance(method, Bound) else method).check(model.device)
    fraction, room = _read_budget(model, budget, max_tokens, batch)
    shape = CacheShape.of(config, stored_dtype(model.dtype, model.device.type))
    if isinstance(profile, (str, Path)):
        profile = Profile.load(profile)
    if profile is not None:
        profile.check(model, shape)
    why = ""  # the model was not measured
    again: Sized | None = None
    if isinstance(method, Bound):
        bound = _again(method, shape, fraction, room, profile)
    else:
        if profile is not None and not method.uses_profile:
            raise ValueError(f"profile= decides nothing for {method.name}, which measures nothing: leave it out")
        measured = method.measured_by() if profile is None else None
        if measured is not None:
            shape.check_pages()  # before it is measured
        elif profile is None and method.uses_profile:
            profile = shipped(model, shape, paper=True)
        if (measured is not None or method.learns) and not _fits_whole(method, shape, fraction, room):
            if measured is not None:
                profile, why = profile_for(model, shape, measured, measure, tokenizer)
            method = method.known(model, shape, tokenizer)
        bound = _bind(method, shape, profile, fraction, room)
        again = None if room is None else Sized(method, profile, room, room.known)
    if bound.warning:
        warnings.warn(f"{bound.warning} ({why})" if why else bound.warning, stacklevel=2)
    return _assemble(model, bound, again)


@dataclass(frozen=True)
class Sized:
    """What a cache was built from whose budget is a size: enough to plan it again.

    fixed: whether the caller named the tokens that are coming.
    """

    method: Method
    profile: Profile | None
    room: Room
    fixed: bool


def expect(model: PreTrainedModel, cache: LongCache, tokens: int, rows: int = 1) -> None:
    """Plan an empty cache anew for what is coming: `rows` rows of `tokens` tokens, prompt and new ones together.

    For those who know it, such as `longwave.generate`: a budget given as a size is then spent on these tokens, not on
    the model's window. A cache that holds tokens, has a fraction, or was built for `max_tokens` stays as it is.
    Raises DoesNotFit, a ValueError with the bytes that would do, and leaves the cache as it was.
    """
    sized: Sized | None = cache.sized
    if sized is None or sized.fixed or cache.get_seq_length():
        return
    sized = replace(sized, room=Room(sized.room.size, tokens, rows))
    bound = bind_to_size(sized.method, cache.method.shape, sized.profile, sized.room)
    vars(cache).update(vars(_assemble(model, bound, sized)))


def check(
    model: PreTrainedModel, method: Method, budget: float | str | None, max_tokens: int | None = None
) -> Bound | None:
    """Raise what `cache` would raise of a model, method and budget, as far as a model without weights can tell. What
    they bind to without a measurement, where there is such a thing."""
    config = check_supported(model)
    fraction, room = _read_budget(model, budget, max_tokens if sized(budget) else None, 1)
    with suppress(Unmeasured):  # there may be a profile
        return _bind(method, CacheShape.of(config, model.dtype), None, fraction, room)
    return None


def sized(budget: float | str | None) -> bool:
    """Whether a budget is a size."""
    return budget is not None and parse_budget(budget)[1] is not None


def _read_budget(
    model: PreTrainedModel, budget: float | str | None, max_tokens: int | None, batch: int
) -> tuple[float | None, Room | None]:
    """A budget as the fraction or the size that it is, each with what goes with it."""
    fraction, size = (None, None) if budget is None else parse_budget(budget)
    whole("batch", batch, 1, "rows")
    if max_tokens is not None:
        whole("max_tokens", max_tokens, 1, "tokens")
    if size is None:
        if max_tokens is not None:
            raise ValueError('max_tokens goes with a budget given as a size, such as "512MiB": leave it out')
        if batch != 1:
            raise ValueError(
                'batch says for how many rows a budget given as a size, such as "512MiB", must do: leave it out'
            )
        return fraction, None
    if holds_states(model.config.get_text_config(decoder=True)):
        raise NotImplementedError(
            "this model has layers that are more than full or sliding attention, and what they hold is not known "
            "beforehand: give the budget as a fraction"
        )
    longest = max_tokens if max_tokens is not None else context_limit(model)
    if longest is None:
        raise ValueError("this model names no context length: give max_tokens with a budget in bytes")
    return None, Room(size, longest, batch, known=max_tokens is not None)


def _bind(
    method: Method, shape: CacheShape, profile: Profile | None, fraction: float | None, room: Room | None
) -> Bound:
    return method.bind(shape, profile, fraction) if room is None else bind_to_size(method, shape, profile, room)


def _fits_whole(method: Method, shape: CacheShape, fraction: float | None, room: Room | None) -> bool:
    """Whether nothing is to be compressed, so that nothing needs to be measured."""
    if room is None or not (room.known and method.fits_budget()):
        return fraction == 1
    return method.bind(shape, None, 1.0).peak_bytes(room.tokens, room.rows) <= room.size


def _assemble(model: PreTrainedModel, bound: Bound, sized: Sized | None) -> LongCache:
    built = assemble(model, bound.layer, bound.needs, bound)
    built.sized = sized
    if sized is not None:
        for layer in built.memory_layers():
            layer.max_tokens, layer.max_rows = sized.room.tokens, sized.room.rows
    return built


def _again(
    bound: Bound, shape: CacheShape, fraction: float | None, room: Room | None, profile: Profile | None
) -> Bound:
    """A method that is bound already: everything is decided, so what is given beside it must be what it was bound
    to."""
    if bound.shape != shape:
        raise ValueError(f"{bound} was bound for another model: layers, heads, head size or dtype differ")
    if room is not None or (fraction is not None and fraction != bound.budget):
        raise ValueError(
            f"{bound} is bound already, to a budget of its own: give the method's options, or leave budget out"
        )
    if profile is not None and profile.digest != bound.profile:
        raise ValueError(
            f"{bound} is bound already, by another profile: give the method's options, or leave profile out"
        )
    return bound
