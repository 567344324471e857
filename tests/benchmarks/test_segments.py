"""What the benchmarks of merged segments plan is what the planner plans."""

import pytest
import torch

import longwave
from benchmarks import caution, segments
from longwave.plan import planner
from longwave.plan.options import code_bytes
from tests.conftest import merging_profile, shape_of

METHOD = longwave.Fourier(segment=16, sinks=3, window=20)


@pytest.fixture
def measured(llama):
    return merging_profile(llama).sensitivity


def test_without_more_options_costs_are_the_planners(llama, measured):
    page = METHOD.page(shape_of(llama))
    layers, heads = measured.key_weight.shape[:2]
    menu = planner.menu(measured, "measured", layers, heads, page)
    for limit in (menu.spent, 2 * menu.spent, 5 * menu.spent):
        costs = sum(unit.costs[i] for unit, i in zip(menu.units, menu.picked(limit), strict=True))
        assert segments.expected(measured, {}, page, limit) == pytest.approx(costs)
    with pytest.raises(planner.TooSmall):
        segments.expected(measured, {}, page, menu.spent - 1)


def test_an_option_that_costs_nothing_is_taken(llama, measured):
    page = METHOD.page(shape_of(llama))
    layers, heads = measured.key_weight.shape[:2]
    free = {2: torch.zeros(len(measured.recall), layers, heads)}
    least = planner.menu(measured, "measured", layers, heads, page).spent
    most = sum(code_bytes(code, page) for code in planner.both_codes("merged", page)) * 4 * layers * heads
    assert segments.expected(measured, free, page, least + most) == pytest.approx(0, abs=1e-9)


def test_never_merges_no_head_and_the_planner_stays_as_it_was(llama):
    usual, profile, shape = planner.CAUTION, merging_profile(llama), shape_of(llama)
    assert any(code.merged for layer in caution.planned(shape, profile, 0.0, 0.3).plan for code in layer.k)
    bound = caution.planned(shape, profile, caution.NEVER, 0.3)
    assert not any(code.merged for layer in bound.plan for code in layer.k)
    assert usual == planner.CAUTION
