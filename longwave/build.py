"""`longwave.cache`: from a model, a method and a budget to an empty cache that fits them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from longwave.budget import bind_to_size, parse_budget
from longwave.checks import whole
from longwave.frame import LongCache, assemble, stored_dtype
from longwave.methods import Bound, Method, get_method
from longwave.plan.automatic import profile_for, shipped
from longwave.plan.profile import Profile
from longwave.shape import CacheShape, check_supported, context_limit, other_layers


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
    """An empty cache for `model.generate(past_key_values=...)`, holding its memory as `method` does.

    method: a name (longwave.methods.METHODS) with its `options` as keywords, an instance, or what another cache of such
        a model is bound to (`cache.method`), which is taken as it is.
    budget: a fraction such as 0.25 of the dense bytes of the middle of the context, or a size such as "512MiB" for
        the whole cache of `batch` rows of `max_tokens` (default: the model's context length); longer input is then
        refused. None leaves it to the method.
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
    fraction, size = (None, None) if budget is None else parse_budget(budget)
    shape = CacheShape.of(config, stored_dtype(model.dtype, model.device.type))
    if isinstance(profile, (str, Path)):
        profile = Profile.load(profile)
    if profile is not None:
        profile.check(model, shape)
    whole("batch", batch, 1, "rows")
    others = other_layers(config)
    if size is not None and not all(layer is None or getattr(layer, "is_sliding", False) for layer in others):
        raise NotImplementedError(
            "this model has layers that are neither full nor sliding attention, and what they hold is not known "
            "beforehand: give the budget as a fraction"
        )
    if max_tokens is not None and (whole("max_tokens", max_tokens, 1, "tokens") < 1 or size is None):
        raise ValueError('max_tokens is at least 1 and goes with a budget given as a size, such as "512MiB"')
    if batch != 1 and size is None:
        raise ValueError(
            'batch says for how many rows a budget given as a size, such as "512MiB", must do: leave it out'
        )
    longest = max_tokens if max_tokens is not None else context_limit(model)
    why = ""  # the model was not measured
    if isinstance(method, Bound):
        bound = _again(method, shape, fraction, size, profile)
    else:
        if profile is not None and not method.uses_profile:
            raise ValueError(f"profile= decides nothing for {method.name}, which measures nothing: leave it out")
        if profile is None and (measured := method.measured_by()) is not None:
            profile, why = profile_for(model, shape, measured, measure, tokenizer)
        elif profile is None and method.uses_profile:
            profile = shipped(model, shape, paper=True)
        if size is None:
            bound = method.bind(shape, profile, fraction)
        elif longest is None:
            raise ValueError("this model names no context length: give max_tokens with a budget in bytes")
        else:
            bound = bind_to_size(method, shape, profile, size, longest, batch)
    if bound.warning:
        warnings.warn(f"{bound.warning} ({why})" if why else bound.warning, stacklevel=2)
    built = assemble(model, bound.layer, bound.needs, bound)
    if size is not None:
        for layer in built.memory_layers():
            layer.max_tokens, layer.max_rows = longest, batch
    return built


def _again(bound: Bound, shape: CacheShape, fraction: float | None, size: int | None, profile: Profile | None) -> Bound:
    """A method that is bound already: everything is decided, so what is given beside it must be what it was bound
    to."""
    if bound.shape != shape:
        raise ValueError(f"{bound} was bound for another model: layers, heads, head size or dtype differ")
    if size is not None or (fraction is not None and fraction != bound.budget):
        raise ValueError(
            f"{bound} is bound already, to a budget of its own: give the method's options, or leave budget out"
        )
    if profile is not None and profile.digest != bound.profile:
        raise ValueError(
            f"{bound} is bound already, by another profile: give the method's options, or leave profile out"
        )
    return bound
