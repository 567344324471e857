"""The methods of a recipe, bound to a model: what makes an empty cache of each, and its settings in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from longwave.evals.asked import read_method
from longwave.evals.recipe import Recipe
from longwave.evals.sampling import read_sampling


def make_ways(model: Any, recipe: Recipe) -> tuple[dict[str, Any], dict[str, str], int]:
    """`make_methods` for a masked-diffusion model: label -> how it is asked."""
    from longwave.diffusion import Dream, LLaDA
    from longwave.evals.masked import Way

    sampler = Dream() if getattr(model.config.get_text_config(decoder=True), "logit_shift", False) else LLaDA()
    held = tuple(spec for spec in recipe.methods if read_sampling(spec).keep is not None)
    if recipe.profile is not None and not held:
        raise ValueError(f"profile={recipe.profile} decides nothing for {', '.join(recipe.methods)}: leave it out")
    makers, words, rows = make_methods(model, replace(recipe, methods=held)) if held else ({}, {}, recipe.batch)
    sampled = {spec: read_sampling(spec) for spec in recipe.methods}
    ways = {spec: Way(sampling, makers.get(spec)) for spec, sampling in sampled.items()}
    said = {spec: f"{words.get(spec, 'no cache')}; {sampling}; {sampler}" for spec, sampling in sampled.items()}
    return ways, said, rows


def make_methods(model: Any, recipe: Recipe) -> tuple[dict[str, Callable[[int], Any]], dict[str, str], int]:
    """label -> function from rows to an empty cache, label -> its settings in words, and the rows a batch may have.

    A budget given as a size bounds a whole cache, so what one prompt gets would depend on its batch: such methods are
    measured one prompt at a time, and so is transformers' quantized cache.
    """
    import longwave
    from longwave.build import sized
    from longwave.evals.stock import Quantized

    makers: dict[str, Callable[[int], Any]] = {}
    words: dict[str, str] = {}
    rows, bounds = recipe.batch, []
    for spec in recipe.methods:
        method, budget = read_method(spec)
        if isinstance(method, Quantized):
            makers[spec], rows = partial(method.cache, model), 1
            words[spec] = makers[spec](1).method
            continue
        profile = recipe.profile if method.uses_profile else None
        bound = longwave.cache(model, method, budget, profile).method
        bounds.append(bound)
        words[spec] = in_words(bound)
        if not sized(budget):
            makers[spec] = partial(_empty, model, (bound,))  # not bound again for every prompt
        else:  # its caches refuse more tokens than the size was worked out for
            makers[spec], rows = partial(_empty, model, (method, budget, profile)), 1
    if recipe.profile is not None and not any(bound.profile for bound in bounds):
        raise ValueError(f"profile={recipe.profile} decides nothing for {', '.join(recipe.methods)}: leave it out")
    return makers, words, rows


def _empty(model: Any, settings: tuple[Any, ...], rows: int) -> Any:
    """A new cache of `settings`; how many rows will read does not matter to it."""
    import longwave

    return longwave.cache(model, *settings)


def in_words(bound: Any) -> str:
    """A method's settings. Where a profile decides what is kept, only the digest tells two of them apart."""
    return f"{bound}, {bound.digest[:16]}" if bound.method.uses_profile else str(bound)
