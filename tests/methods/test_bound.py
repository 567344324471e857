"""Options are not decisions: what is bound stays as it was decided, and differs where anything decided differs."""

import copy
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.methods import METHODS, get_method
from longwave.methods.base import CacheShape
from longwave.methods.dense import DenseBound
from tests.conftest import into, random_profile, shape_of, tokens

SMALL = dict(sinks=2, window=8)
# options, and budgets that decide otherwise
METHODS_AND_BUDGETS = {
    "fourier": (longwave.Fourier(segment=8, **SMALL), (0.2, 0.9)),
    "kivi": (longwave.Kivi(group=8, **SMALL), (0.2, 0.99)),
    "streaming": (longwave.Streaming(**SMALL), (0.2, 0.9)),
    "snapkv": (longwave.SnapKV(**SMALL), (0.2, 0.9)),
    "snapkv-pages": (longwave.SnapKV(store=longwave.Kivi(group=8), **SMALL), (0.05, 0.1)),
    "h2o": (longwave.H2O(**SMALL), (0.2, 0.9)),
    "quest": (longwave.Quest(sinks=2, window=8), (0.2, 0.9)),
}
NO_BUDGET = {
    "dense": longwave.Dense(),
    "fourier-paper": longwave.FourierPaper(states=8, **SMALL),
    "kivi-bits": longwave.Kivi(bits=2, group=8, **SMALL),
    "streaming-tokens": longwave.Streaming(tokens=20, **SMALL),
    "streaming-slots": longwave.Streaming(tokens=20, positions="slots", **SMALL),
}


def bind(model, method, budget=None, seed=0):
    """What longwave.cache binds, and the profile that it was given."""
    profile = random_profile(model, seed) if method.uses_profile else None
    return longwave.cache(model, method, budget, profile).method, profile


@pytest.mark.parametrize("name", [*METHODS_AND_BUDGETS, *NO_BUDGET])
def test_a_bound_method_given_again_keeps_its_plan(llama, name):
    method, budgets = METHODS_AND_BUDGETS.get(name, (NO_BUDGET.get(name), (None,)))
    for budget in budgets:
        bound, profile = bind(llama, method, budget)
        for given in ({}, {"budget": budget}, {"profile": profile}):
            again = longwave.cache(llama, bound, **given).method
            assert again is bound
        with torch.no_grad():
            made = [longwave.cache(llama, x) for x in (bound, copy.deepcopy(bound))]
            for memory in made:
                llama(tokens(1, 60), **into(memory))
            assert made[0].nbytes == made[1].nbytes == bound.nbytes(60)


@pytest.mark.parametrize("name", list(METHODS_AND_BUDGETS))
def test_methods_bound_to_other_budgets_differ(llama, name):
    method, budgets = METHODS_AND_BUDGETS[name]
    first, second = (bind(llama, method, budget)[0] for budget in budgets)
    same, _ = bind(llama, method, budgets[0])
    assert first == same
    assert hash(first) == hash(same)
    assert first.digest == same.digest
    assert first != second
    assert len({first, same, second}) == 2
    assert str(first) != str(second)
    assert first != method
    assert first.method == second.method == method
    assert (first.budget, second.budget) == budgets


@pytest.mark.parametrize("name", ["fourier", "fourier-paper"])
def test_methods_bound_by_other_profiles_differ(llama, name):
    method = {**METHODS_AND_BUDGETS, **NO_BUDGET}[name]
    method, budget = (method[0], 0.3) if isinstance(method, tuple) else (method, None)
    (first, profile), (second, other) = (bind(llama, method, budget, seed) for seed in (0, 1))
    assert first != second
    assert first.profile == profile.digest != other.digest == second.profile
    with pytest.raises(ValueError, match="is bound already, by another profile"):
        longwave.cache(llama, first, profile=other)


def test_other_options_are_other_decisions(llama):
    """Even where they lead to the same bytes, they are not the same thing."""
    options = [
        longwave.Streaming(**SMALL),
        longwave.Streaming(positions="slots", **SMALL),
        longwave.H2O(**SMALL),
        longwave.SnapKV(**SMALL),
        longwave.SnapKV(pool="max", **SMALL),
        longwave.SnapKV(kernel=7, **SMALL),
        longwave.Quest(chunk=8),
        longwave.Quest(chunk=16),
    ]
    bounds = [option.bind(shape_of(llama), None, 0.3) for option in options]
    assert len(set(bounds)) == len(options)


@pytest.mark.parametrize("name", list(METHODS_AND_BUDGETS))
def test_a_budget_beside_a_bound_method_must_be_its_own(llama, name):
    bound, _ = bind(llama, METHODS_AND_BUDGETS[name][0], METHODS_AND_BUDGETS[name][1][0])
    for budget, more in ((0.77, {}), ("10MB", {"max_tokens": 100})):
        with pytest.raises(ValueError, match=r"is bound already, to a budget of its own"):
            longwave.cache(llama, bound, budget, **more)
    with pytest.raises(ValueError, match="options belong in the method instance"):
        longwave.cache(llama, bound, window=9)


@pytest.mark.parametrize("name", ["kivi", "streaming", "snapkv", "snapkv-pages", "h2o", "quest", "dense"])
def test_a_profile_that_decides_nothing_is_refused(llama, name):
    method = METHODS_AND_BUDGETS[name][0] if name in METHODS_AND_BUDGETS else NO_BUDGET[name]
    with pytest.raises(ValueError, match=f"profile= decides nothing for {method.name}.*leave it out"):
        longwave.cache(llama, method, profile=random_profile(llama))
    with pytest.raises(ValueError, match="bound already, by another profile"):
        longwave.cache(
            llama,
            bind(llama, method, None if name == "dense" else METHODS_AND_BUDGETS[name][1][0])[0],
            profile=random_profile(llama),
        )


def test_a_store_of_measured_pages_takes_the_profile(llama):
    """Policy and store compose: what the store is planned with is the method's too."""
    policy = longwave.SnapKV(store=longwave.Fourier(segment=8), store_budget=0.4, **SMALL)
    first, second = (longwave.cache(llama, policy, 0.1, random_profile(llama, seed)).method for seed in (0, 1))
    assert "measured plan for 0.4" in str(first)
    assert first != second
    assert first.profile == random_profile(llama, 0).digest
    assert longwave.cache(llama, first, profile=random_profile(llama, 0)).method is first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longwave.cache(llama, policy, 0.1, random_profile(llama))
    with pytest.warns(UserWarning, match="was not measured"):
        longwave.cache(llama, policy, 0.1)
    assert not longwave.SnapKV.uses_profile
    assert not longwave.SnapKV(store="kivi").uses_profile


@pytest.mark.parametrize("name", [*METHODS_AND_BUDGETS, *NO_BUDGET])
def test_a_method_bound_for_another_model_is_refused(models, llama, name):
    method, budgets = METHODS_AND_BUDGETS.get(name, (NO_BUDGET.get(name), (None,)))
    bound, _ = bind(llama, method, budgets[0])
    with pytest.raises(ValueError, match="was bound for another model: layers, heads, head size or dtype differ"):
        longwave.cache(models["qwen3"][0], bound)
    with pytest.raises(ValueError, match="was bound for another model"):
        longwave.cache(copy.deepcopy(llama).to(torch.bfloat16), bound)


def test_a_method_is_a_name_or_an_instance(llama):
    for wrong in (longwave.Streaming, 3, None):
        with pytest.raises(TypeError, match=r"a name or an instance such as longwave\.Fourier"):
            longwave.cache(llama, wrong)


# by name


@pytest.fixture
def registry():
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


@dataclass(frozen=True)
class Third(longwave.Method):
    """A third party's."""

    name: ClassVar[str] = "third-party"
    level: int = 3

    def bind(self, shape: CacheShape, profile, budget):
        return DenseBound(self, shape, budget)


def test_a_third_party_registers_a_method(llama, registry):
    with pytest.raises(ValueError, match="unknown method 'third-party'"):
        get_method("third-party")
    assert longwave.register(Third) is Third
    assert longwave.register(Third) is Third  # a module may be imported twice
    assert get_method("third-party", level=4) == Third(4)
    memory = longwave.cache(llama, "third-party", level=5)
    assert memory.method.method.level == 5
    with torch.no_grad():
        llama(tokens(1, 20), **into(memory))
    with pytest.raises(ValueError, match="third-party has no option 'leve'; did you mean 'level'"):
        longwave.cache(llama, "third-party", leve=5)
    with pytest.raises(ValueError, match="unknown method 'third-parti'; did you mean 'third-party'"):
        get_method("third-parti")


@pytest.mark.parametrize("name", ["fourier", "dense", "h2o"])
def test_a_name_that_is_taken_is_refused(registry, name):
    taken = METHODS[name]
    with pytest.raises(ValueError, match=f"there is a method called '{name}' already: {taken.__qualname__}"):
        longwave.register(type("Mine", (Third,), {"name": name}))
    assert METHODS[name] is taken


@pytest.mark.parametrize("wrong", [3, "kivi", Third(), torch.nn.Module, longwave.Bound], ids=repr)
def test_what_is_no_method_is_refused(registry, wrong):
    with pytest.raises(TypeError, match=r"a method is a subclass of longwave\.Method"):
        longwave.register(wrong)


def test_every_name_says_itself():
    for name, method in METHODS.items():
        assert method.name == name
        assert get_method(name) == method()
    assert {"dense", "fourier", "fourier-paper", "kivi", "streaming", "snapkv", "h2o", "quest"} <= METHODS.keys()
