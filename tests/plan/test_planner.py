"""The planner: exact in bytes, optimal where that can be checked, never above its limit."""

import itertools
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import longwave
from longwave import plan
from longwave.methods.base import CacheShape
from longwave.ops.spectral.layout import OWN, Code
from longwave.plan import (
    BOTH_OPTIONS,
    KEY_BITS,
    KEY_MORE,
    KEY_OPTIONS,
    NOISE,
    OWN_TYPE,
    VALUE_MORE,
    VALUE_OPTIONS,
    Shape,
    Unit,
)
from longwave.plan.profile import Profile, Sensitivity

SHAPE = Shape(segment=128, dim=64, states=1, state_bits=8, dtype=torch.float16)
SMOLLM2 = CacheShape(tuple(range(30)), (), 3, 64, torch.float16)


@pytest.fixture(scope="module")
def profile():
    return Profile.load(Path(longwave.__file__).parent / "plan" / "profiles" / "smollm2.json")


def made_up(layers=2, heads=3, dim=64, seed=0):
    """A measurement in which every head has its own falling costs."""
    g = torch.Generator().manual_seed(seed)

    def falling(options):
        return torch.rand(4, layers, heads, options, generator=g).sort(-1, descending=True).values

    about = {"k_options": list(KEY_OPTIONS), "v_options": list(VALUE_OPTIONS), "both_options": list(BOTH_OPTIONS)}
    costs = map(falling, (len(KEY_OPTIONS), len(VALUE_OPTIONS), len(BOTH_OPTIONS)))
    return Sensitivity(about, *costs, torch.tensor([False, True] * 2), torch.rand(layers, heads, dim, generator=g))


def falling_weights(seed, n=64, spread=3.0):
    draw = random.Random(seed)
    return sorted((math.exp(draw.gauss(0, spread)) for _ in range(n)), reverse=True)


# the lower hull


def test_hull_by_hand():
    #         0   1    2    3     4    5    6
    sizes = [10, 20, 30, 30, 40, 50, 15]
    costs = [9.0, 5, 4.5, 2, 2.5, 0, 8]
    assert plan.lower_hull(sizes, costs) == [0, 1, 3, 5]
    assert plan.lower_hull([7], [3.0]) == [0]
    assert plan.lower_hull([5, 6, 7], [1.0, 1.0, 2.0]) == [0]
    assert plan.lower_hull([5, 5], [2.0, 1.0]) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_hull_is_convex_and_below_every_option(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 20) for _ in range(12)]
    costs = [draw.random() for _ in range(12)]
    hull = plan.lower_hull(sizes, costs)
    corners = [(sizes[i], costs[i]) for i in hull]
    assert corners[0][0] == min(sizes)
    assert corners[-1][1] == min(costs)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(corners)]
    assert slopes == sorted(slopes)
    assert all(slope < 0 for slope in slopes)
    for size, cost in zip(sizes, costs, strict=True):
        if size >= corners[-1][0]:
            assert cost >= corners[-1][1]
            continue
        (x0, y0), (x1, y1) = next((a, b) for a, b in itertools.pairwise(corners) if a[0] <= size <= b[0])
        assert cost >= y0 + (y1 - y0) * (size - x0) / (x1 - x0) - 1e-12


# choosing

# codes whose bytes rise by equal steps: one price then finds the very best plan for convex costs
SMALL = Shape(segment=16, dim=64, states=2, state_bits=16, dtype=torch.float32)
STEPS = tuple(Code(((8, 8 * i),) if i else (), 2, state_bits=16) for i in range(5))
FLAT = Code((), 2, state_bits=16)


def convex_unit(draw):
    gains = sorted((draw.random() ** 3 for _ in STEPS[1:]), reverse=True)
    costs = [sum(gains[i:]) for i in range(len(STEPS))]
    return Unit(tuple((code, FLAT) for code in STEPS), tuple(costs))


def spent(chosen, shape):
    return sum(plan.code_bytes(code, shape) for pair in chosen for code in pair)


def cost_of(units, chosen):
    return sum(unit.costs[unit.codes.index(pair)] for unit, pair in zip(units, chosen, strict=True))


def brute_force(units, shape, limit):
    best = math.inf
    for picks in itertools.product(*(range(len(unit.codes)) for unit in units)):
        pairs = [unit.codes[i] for unit, i in zip(units, picks, strict=True)]
        if spent(pairs, shape) <= limit:
            best = min(best, sum(unit.costs[i] for unit, i in zip(units, picks, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(10))
def test_choice_is_the_best_there_is(seed):
    draw = random.Random(seed)
    units = [convex_unit(draw) for _ in range(4)]
    least, most = (sum(plan.code_bytes(c, SMALL) for c in unit.codes[i]) * 4 for i in (0, -1) for unit in units[:1])
    step = (most - least) // 16
    for limit in (least, least + step, least + 5 * step + 7, most - 1, most, most + 1000):
        chosen = plan.choose(units, SMALL, limit)
        assert spent(chosen, SMALL) <= limit
        assert spent(chosen, SMALL) > min(limit, most) - step
        assert cost_of(units, chosen) == pytest.approx(brute_force(units, SMALL, limit), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_choice_is_never_worse_than_a_uniform_one(seed):
    draw = random.Random(seed)
    units = [convex_unit(draw) for _ in range(40)]
    better = 0
    for i in range(len(STEPS)):
        uniform = [unit.codes[i] for unit in units]
        chosen = plan.choose(units, SMALL, spent(uniform, SMALL))
        assert spent(chosen, SMALL) <= spent(uniform, SMALL)
        assert cost_of(units, chosen) <= cost_of(units, uniform) + 1e-12
        better += cost_of(units, chosen) < 0.9 * cost_of(units, uniform)
    assert better >= 2


@pytest.mark.parametrize("seed", range(5))
def test_unequal_steps_lose_at_most_one_of_them(seed):
    """A price cannot fill the last bytes: what is lost is less than one step of one head."""
    units = plan.units(made_up(1, 2, seed=seed), "measured", 0, 2, SHAPE)
    sizes = [[sum(plan.code_bytes(c, SHAPE) for c in pair) for pair in unit.codes] for unit in units]
    hulls = [plan.lower_hull(size, unit.costs) for size, unit in zip(sizes, units, strict=True)]
    step = max(
        unit.costs[a] - unit.costs[b]
        for unit, hull in zip(units, hulls, strict=True)
        for a, b in itertools.pairwise(hull)
    )
    for limit in (2000, 4000, 9000, 20000):
        chosen = plan.choose(units, SHAPE, limit)
        assert spent(chosen, SHAPE) <= limit
        assert cost_of(units, chosen) <= brute_force(units, SHAPE, limit) + step


def test_limits_below_the_smallest_plan_say_what_it_takes():
    units = [convex_unit(random.Random(0)) for _ in range(3)]
    with pytest.raises(plan.TooSmall) as caught:
        plan.choose(units, SMALL, 10)
    assert str(caught.value.needed) in str(caught.value)
    assert spent(plan.choose(units, SMALL, caught.value.needed), SMALL) == caught.value.needed
    with pytest.raises(plan.TooSmall):
        plan.choose(units, SMALL, caught.value.needed - 1)


# K's runs


def average(runs, shape):
    state = shape.states * (shape.state_bits or shape.dtype.itemsize * 8) / shape.segment
    kept = sum(n for _, n in runs)
    return (sum(n * (bits + 32 / shape.segment) for bits, n in runs) + (shape.dim - kept) * state) / shape.dim


TARGETS = [*KEY_OPTIONS, 0.3, 5.0, 8.0, 8.25, 20.0]


@pytest.mark.parametrize("shape", [SHAPE, Shape(32, 64, 4, 16, torch.float16), Shape(64, 64, 2, 0, torch.float32)])
@pytest.mark.parametrize("seed", range(4))
def test_runs_keep_to_the_target(shape, seed):
    weights = falling_weights(seed)
    last = -1.0
    for target in sorted(TARGETS):
        runs = plan.key_runs(weights, target, shape)
        used = average(runs, shape)
        nothing = average((), shape)
        assert used <= max(target, nothing) + 1e-6
        assert used >= last - 1e-9  # more is never answered with less
        last = used
        assert all(n % 8 == 0 and bits in KEY_BITS for bits, n in runs)
        assert [bits for bits, _ in runs] == sorted({bits for bits, _ in runs}, reverse=True)
        assert sum(n for _, n in runs) <= 64
    assert plan.key_runs(weights, 20.0, shape) == ((8, 64),)
    assert plan.key_runs(weights, 0.0, shape) == ()


def weighted_error(weights, bits):
    return sum(weight * NOISE[b] for weight, b in zip(weights, bits, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_runs_are_near_the_least_weighted_error(seed):
    """Against every way to give 32 channels bits by eights, in any order of the blocks."""
    shape = Shape(128, 32, 1, 8, torch.float16)
    weights = falling_weights(seed, 32, 1.5)
    for target in (0.7, 1.3, 2.2, 3.5):
        runs = plan.key_runs(weights, target, shape)
        own = [bits for bits, n in runs for _ in range(n)]
        own += [0] * (32 - len(own))
        best = math.inf
        for blocks in itertools.product((0, *KEY_BITS), repeat=4):
            bits = [b for b in blocks for _ in range(8)]
            counts = Counter(b for b in bits if b)
            if average(tuple(counts.items()), shape) <= target + 1e-6:
                best = min(best, weighted_error(weights, bits))
        # filling block by block may leave up to a block's step unused
        assert weighted_error(weights, own) <= best * 1.5 + 1e-9


def test_more_weight_never_gets_fewer_bits():
    """Runs lie over falling weights, so a block that is asked for alone must win over the others."""
    weights = [100.0] * 8 + [1.0] * 56
    (bits, count), *rest = plan.key_runs(weights, 0.7, SHAPE)
    assert (bits, count) == (4, 8)
    assert rest == []
    assert plan.key_runs([1.0] * 64, 2.25, SHAPE) == ((2, 64),)
    # the same weights, spread over more: first the heavy half, at the fewest bits
    assert plan.key_runs([10.0] * 32 + [0.01] * 32, 1.16, SHAPE) == ((2, 32),)


CUTS = [
    (segment, states, bits)
    for segment in (8, 16, 24, 32, 64, 128, 512)
    for states in sorted({1, 2, 3, segment // 4, segment // 2, 3 * segment // 8, segment - 1, segment})
    for bits in (8, 16, 0)
]
WEIGHTS = {
    "falling": falling_weights(0),
    "alike": [1.0] * 64,
    "none": [0.0] * 64,
    "few": [1.0] * 8 + [0.0] * 56,
    "tiny": [1e-300] * 64,
    "huge": [1e300] * 8 + [1.0] * 56,
}


@pytest.mark.parametrize("weights", list(WEIGHTS.values()), ids=list(WEIGHTS))
def test_whatever_states_cost_runs_keep_to_the_target(weights):
    """States may cost as much as some bits, or more: these are then worth any price, and nothing divides by zero."""
    for segment, states, bits in CUTS:
        for dtype in (torch.float16, torch.float32):
            shape = Shape(segment, 64, states, bits, dtype)
            nothing = average((), shape)
            for target in (*KEY_OPTIONS, *KEY_MORE[:1], 5.0, 20.0):
                runs = plan.key_runs(weights, target, shape)
                assert average(runs, shape) <= max(target, nothing) + 1e-6, (shape, target)
                assert sum(n for _, n in runs) <= 64
                assert [b for b, _ in runs] == sorted({b for b, _ in runs} & set(KEY_BITS), reverse=True)
                code = plan.key_code(weights, target, shape)
                code.check(64, segment)
                assert code.runs == runs


def test_bits_that_cost_no_more_than_states_are_always_taken():
    shape = Shape(
        32, 64, 12, 8, torch.float16
    )  # 12 coefficients of 8 bits are 3 bits a number, and so are 2 with a scale
    assert average((), shape) == 3
    for weights in WEIGHTS.values():
        assert sum(n for _, n in plan.key_runs(weights, 0.0, shape)) == 64
    assert plan.key_runs([1.0] * 64, 0.0, shape) == ((2, 64),)


@pytest.mark.parametrize(("measured", "kind"), [(made_up(), "uniform"), (None, "safe")], ids=["measured", "safe"])
def test_every_legal_cut_can_be_planned(measured, kind):
    for segment, states, bits in CUTS[::5]:
        shape = Shape(segment, 64, states, bits, torch.float16)
        units = [unit for position in range(2) for unit in plan.units(measured, kind, position, 3, shape)]
        dense = 6 * 2 * segment * 64 * 2
        for limit in (dense, dense * 1.5):
            assert spent(plan.choose(units, shape, limit), shape) <= limit


def test_channels_that_are_no_multiple_of_eight():
    shape = Shape(128, 20, 1, 8, torch.float16)
    runs = plan.key_runs(falling_weights(0, 20), 2.0, shape)
    assert average(runs, shape) <= 2.0 + 1e-6
    assert plan.key_runs(falling_weights(0, 20), 9.0, shape) == ((8, 20),)


# codes


@pytest.mark.parametrize("shape", [SHAPE, Shape(64, 64, 2, 16, torch.float32)])
def test_every_option_of_k_fits_a_page(shape):
    weights = falling_weights(1)
    sizes = []
    for option in (*KEY_OPTIONS, *KEY_MORE):
        for given in (weights, None):
            code = plan.key_code(given, option, shape)
            code.check(shape.dim, shape.segment)
            assert code.axis == "time"
            assert not code.residual
            assert code.states == (0 if code.kept == shape.dim else shape.states)
            assert option == OWN_TYPE or code.state_bits == shape.state_bits
            bits = 8 * plan.code_bytes(code, shape) / (shape.segment * shape.dim)
            floor = average((), shape)
            assert option == OWN_TYPE or bits <= max(option, floor) + 0.05  # sixteens of bytes
            if given is not None:
                sizes.append(bits)
            else:
                assert len(code.runs) <= 1
                assert not code.runs or code.kept == shape.dim
    assert sizes == sorted(sizes)
    assert sizes[-1] == shape.dtype.itemsize * 8
    assert plan.key_code(weights, OWN_TYPE, shape) == Code(((OWN, 64),), states=0)


@pytest.mark.parametrize(
    ("option", "bits"), [(0.0, 0), (1.7, 0), (2.24, 0), (2.25, 2), (3.25, 3), (3.5, 3), (4.25, 4), (8.25, 8)]
)
def test_without_weights_all_channels_take_the_same_bits(option, bits):
    assert plan.key_code(None, option, SHAPE).runs == (((bits, 64),) if bits else ())


def test_every_option_of_v_fits_a_page():
    sizes = []
    for option in (*VALUE_OPTIONS, *VALUE_MORE):
        code = plan.value_code(option, SHAPE)
        code.check(SHAPE.dim, SHAPE.segment)
        sizes.append(plan.code_bytes(code, SHAPE))
        if option == OWN_TYPE:
            assert code == Code(((OWN, 64),), states=0)
            continue
        assert code.states == 1
        assert code.state_bits == 8
        assert code.smooth(64) == 64
        assert code.runs == (((option, 64),) if option else ())
        assert code.residual == bool(option)
        # codes, a scale a token, a mean in 8 bits with its gain
        assert sizes[-1] == (64 * 128 * option // 8 + 128 * 2 if option else 0) + 64 + 16
    assert sizes == sorted(sizes)
    assert sizes[-1] == 128 * 64 * 2


def test_bytes_of_a_head_are_never_less_than_its_part_of_a_page():
    from longwave.ops.spectral.layout import Layout

    order = torch.arange(64).expand(3, -1)
    for option in (*KEY_OPTIONS, *KEY_MORE):
        code = plan.key_code(falling_weights(2), option, SHAPE)
        whole = Layout([code] * 3, [], order, order[:0], 128, torch.float16).page_bytes
        assert whole <= 3 * plan.code_bytes(code, SHAPE) <= whole + 3 * 16 * 6


# units


def test_costs_of_a_head_add_up_but_where_only_the_mean_is_left():
    key, mean = Code(((4, 64),), 0), Code((), 1)
    four, value = Code((), 4), Code(((2, 64),), 1, "token", True)
    own = Code(((OWN, 64),), 0)
    made = plan.joined([(mean, 5.0), (four, 4.0), (key, 1.0)], [(value, 0.25), (own, 0.5), (mean, 2.0)])
    costs = dict(zip(made.codes, made.costs, strict=True))
    assert costs == {
        (mean, value): 5.0,  # V's mean is in there, and that is all that is asked for
        (mean, own): 5.5,  # no states, no mean
        (mean, mean): 5.0,
        (four, value): 4.25,
        (four, own): 4.5,
        (four, mean): 6.0,
        (key, value): 1.25,
        (key, own): 1.5,
        (key, mean): 3.0,
    }


def test_more_options_are_worth_a_fraction_of_the_last():
    assert plan.extended([1.0, 0.5]) == (1.0, 0.5, 0.5 * plan.EIGHT, 0.0)


def test_measured_units_have_the_heads_own_costs():
    measured = made_up()
    for position in range(2):
        found = plan.units(measured, "measured", position, 3, SHAPE)
        assert len(found) == 3
        for head, unit in enumerate(found):
            assert len(unit.codes) == (len(KEY_OPTIONS) + 2) * (len(VALUE_OPTIONS) + 2) + len(BOTH_OPTIONS)
            k, v, both = (
                every[::2, position, head].mean(0) + plan.RECALL * every[1::2, position, head].mean(0)
                for every in (measured.k, measured.v, measured.both)
            )
            worst = sorted(float(measured.both[:, i, j, 0].max()) for i in range(2) for j in range(3))
            rarely = plan.CAUTION * worst[2] / len(measured.recall)  # one window more, as bad as the median's worst
            assert unit.costs[: len(BOTH_OPTIONS)] == pytest.approx([float(both) + rarely], rel=1e-6)
            assert unit.codes[0] == plan.both_codes("merged", SHAPE)
            weights = measured.key_weight[position, head].sort(descending=True).values.tolist()
            pair = plan.key_code(weights, 2.8, SHAPE), plan.value_code(3, SHAPE)
            expected = k[KEY_OPTIONS.index(2.8)] + v[VALUE_OPTIONS.index(3)]
            assert unit.costs[unit.codes.index(pair)] == pytest.approx(float(expected), rel=1e-6)
            assert unit.costs[-1] == 0.0
            assert unit.codes[-1] == (Code(((OWN, 64),), 0), Code(((OWN, 64),), 0))


def test_uniform_units_all_cost_the_mean():
    measured = made_up()
    found = [unit for position in range(2) for unit in plan.units(measured, "uniform", position, 3, SHAPE)]
    assert len({unit.costs for unit in found}) == 1
    k, v = (measured.costs(side).mean((0, 1)) for side in ("k", "v"))
    assert found[0].costs[len(BOTH_OPTIONS) + (len(VALUE_OPTIONS) + 2) * 3 + 2] == pytest.approx(
        float(k[3] + v[2]), rel=1e-6
    )


def test_safe_units_take_the_usual_costs():
    one, three = (plan.units(None, "safe", 0, heads, SHAPE) for heads in (1, 3))
    assert len(three) == 3
    assert len({(unit.codes, unit.costs) for unit in three}) == 1
    torch.testing.assert_close(torch.tensor(three[0].costs) * 3, torch.tensor(one[0].costs))
    assert all(len(key.runs) <= 1 for key, _ in one[0].codes)
    assert any(key.kept == 0 for key, _ in one[0].codes)
    assert not any((2, 64) in key.runs or (1, 64) in value.runs for key, value in one[0].codes)
    coarse = plan.units(None, "coarse", 0, 1, SHAPE)[0]
    assert set(one[0].codes) < set(coarse.codes)
    assert any((2, 64) in key.runs and (1, 64) in value.runs for key, value in coarse.codes)
    deep = plan.units(None, "safe", 0, 1, SHAPE, flat=False)[0]
    assert set(deep.codes) < set(one[0].codes)
    assert all(key.kept == value.kept == 64 for key, value in deep.codes)
    # whatever was measured
    assert plan.units(made_up(), "safe", 0, 3, SHAPE) == three


def test_bits_alone_compress_no_channel():
    found = plan.units(made_up(), "bits", 0, 3, SHAPE)
    assert all(key.kept == value.kept == 64 for unit in found for key, value in unit.codes)
    assert all(len(unit.codes) > 5 for unit in found)
    assert all(len(unit.codes) == len(unit.costs) == len(unit.options) for unit in found)


# plans of a whole model


def test_what_a_plan_is_expected_to_cost():
    """The sum over heads of what the windows of text say, and how they differ."""
    measured = made_up(2, 3)
    options = [(3, 2), (0, 4), (8, 0), (9, 1), (10, 6), (5, 5)]
    flat = [False, True, False, False, False, False]
    sums = []
    for window in (0, 2):  # the others ask for facts
        total = 0.0
        for number, (i, j) in enumerate(options):
            k, v = (x[window, number // 3, number % 3].tolist() for x in (measured.k, measured.v))
            k, v = ([*costs, costs[-1] * plan.EIGHT, 0.0] for costs in (k, v))
            total += k[i] + (0.0 if flat[number] else v[j])
        sums.append(total)
    found = plan.expected(measured, options, flat)
    assert found.kl == pytest.approx(sum(sums) / 2, rel=1e-5)
    assert found.error == pytest.approx(abs(sums[0] - sums[1]) / 2, rel=1e-3)  # of two: half their distance
    assert str(plan.Expected(0.00312, 0.00041)) == "KL 0.0031 ± 0.0004"


BUDGETS = [0.021, 0.04, 0.06, 0.1, 0.125, 0.156, 0.2, 0.25, 0.33, 0.5, 0.7, 0.9]
KINDS = [(kind, x) for kind in ("measured", "uniform", "bits") for x in BUDGETS if kind != "bits" or x > 0.15]


@pytest.mark.parametrize(("kind", "budget"), KINDS)
def test_pages_take_no_more_than_the_budget(profile, kind, budget):
    bound = longwave.Fourier(plan=kind).bind(SMOLLM2, profile, budget)
    assert bound.page_fraction() <= budget
    if kind == "measured" and budget >= 0.1:
        assert bound.page_fraction() >= 0.9 * budget


@pytest.mark.parametrize("kind", ["measured", "uniform", "bits"])
def test_a_budget_below_the_smallest_plan_is_refused(profile, kind):
    method = longwave.Fourier(plan=kind)
    with pytest.raises(ValueError, match=r"a budget of 0\.001 is less than fourier can do") as caught:
        method.bind(SMOLLM2, profile, 0.001)
    needed = float(str(caught.value).split("smallest plan takes ")[1].split(". ")[0])  # four digits
    method.bind(SMOLLM2, profile, needed + 1e-4)
    with pytest.raises(ValueError, match="less than fourier can do"):
        method.bind(SMOLLM2, profile, needed - 1e-4)


def test_at_one_everything_keeps_its_own_type(profile):
    bound = longwave.Fourier().bind(SMOLLM2, profile, 1.0)
    assert bound.page_fraction() == 1.0
    assert all(bool(table.all()) for pair in bound.kept for table in pair)


def test_a_larger_budget_never_costs_more(profile):
    measured = profile.sensitivity
    page = longwave.Fourier().page(SMOLLM2)
    units = [unit for position in range(30) for unit in plan.units(measured, "measured", position, 3, page)]
    dense = 30 * 128 * SMOLLM2.token_bytes
    costs = [cost_of(units, plan.choose(units, page, budget * dense)) for budget in BUDGETS]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 100


def test_a_measured_plan_costs_less_than_a_uniform_one(profile):
    """By its own measurement: what the two plans differ in is whose costs they were made with."""
    measured, page = profile.sensitivity, longwave.Fourier().page(SMOLLM2)
    own, same = (
        [unit for position in range(30) for unit in plan.units(measured, kind, position, 3, page)]
        for kind in ("measured", "uniform")
    )
    for budget in (0.06, 0.1, 0.156, 0.25):
        limit = budget * 30 * 128 * SMOLLM2.token_bytes
        assert cost_of(own, plan.choose(own, page, limit)) < 0.8 * cost_of(own, plan.choose(same, page, limit))


def test_the_least_budget_is_the_least(profile):
    method = longwave.Fourier(plan="measured")
    least = method.least_budget(SMOLLM2, profile)
    assert method.bind(SMOLLM2, profile, least).page_fraction() <= least
    with pytest.raises(ValueError, match="less than fourier can do"):
        method.bind(SMOLLM2, profile, least * 0.99)


@pytest.mark.parametrize("kind", ["measured", "uniform", "bits"])
def test_the_least_budget_can_be_bound(profile, kind):
    """A budget given as a size starts its search there."""
    method = longwave.Fourier(plan=kind)
    least = method.least_budget(SMOLLM2, profile)
    assert method.bind(SMOLLM2, profile, least).page_fraction() <= least
