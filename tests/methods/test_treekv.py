"""treekv: kept-token traces of the specification, turns and rounds, blocks after a prompt, against lists."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.methods.held import held_by
from longwave.methods.treekv import RULES, knockout
from tests.conftest import tokens
from tests.methods import naive
from tests.methods.naive import SCALE, H, draw, drive
from tests.methods.test_evicting import new_layer, run
from tests.reading import read_in

OPEN = dict(sinks=0, window=0)


@dataclass(frozen=True)
class OneSided(longwave.TreeKV):
    """Of a pair always the same token stays: the paper's ablation."""

    name: ClassVar[str] = "one-sided"
    left: bool = True

    def worth(self, held):
        order = torch.arange(held.k.shape[2], dtype=torch.float32).expand(held.k.shape[:3])
        return -order if self.left else order


def trace(method, count):
    """Places kept, counted from 1, after each of `count` steps."""
    layer, found = new_layer(method), {}
    k, v, q = draw(1, count)
    for t, _ in enumerate(drive(layer, k, v, q, [1] * count), 1):
        rows = layer.dense.column("position")[0] + 1
        assert torch.equal(rows[0], rows[1])
        found[t] = rows[0].tolist()
    return found


def test_kept_left_is_the_trace_of_the_specification():
    found = trace(OneSided(tokens=4, **OPEN), 17)
    expected = {
        **{5: [1, 3, 4, 5], 6: [1, 3, 5, 6], 7: [1, 3, 5, 7], 8: [1, 3, 5, 7], 9: [1, 5, 7, 9]},
        **{13: [1, 9, 11, 13], 17: [1, 13, 15, 17]},
    }
    assert {t: found[t] for t in expected} == expected


def test_kept_right_is_the_trace_of_the_specification():
    found = trace(OneSided(tokens=4, left=False, **OPEN), 17)
    expected = {5: [2, 3, 4, 5], 8: [2, 4, 6, 8], 9: [4, 6, 8, 9], 17: [12, 14, 16, 17]}
    assert {t: found[t] for t in expected} == expected


@pytest.mark.parametrize(("rule", "turns"), [("text", [0, 1, 2, 3] * 3 + [0]), ("printed", [0, 2] * 6 + [0])])
def test_turns_are_those_of_the_rule_and_depend_on_no_data(rule, turns):
    """With c = 4 evictions start at step 5, and at step 17 the turn is the first slot's again by either rule."""
    layer = new_layer(longwave.TreeKV(tokens=4, index_rule=rule, **OPEN))
    k, v, q = draw(2, 16)
    found = []
    for _ in drive(layer, k, v, q, [1] * 16):
        found.append(layer.turn.tolist())
    assert [one for one, _ in found[3:]] == turns
    assert all(one == other for one, other in found)


def by_hand(k, v, q, method, count):
    """One head, token by token: places kept, after each."""
    c, at, held, mass = method.tokens - method.sinks - method.window, 0, [], {}
    for t in range(count):
        held.append(t)
        p = (q[:, t] @ k[held].T * SCALE).softmax(-1).sum(0)
        for place, got in zip(held, p.tolist(), strict=True):
            mass[place] = mass.get(place, 0.0) + got
        if len(held) > method.tokens:
            left, right = held[method.sinks + at : method.sinks + at + 2]
            held.remove(right if mass[left] / (t - left + 1) > mass[right] / (t - right + 1) else left)
            at = (at + RULES[method.index_rule]) % c
        yield list(held)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(("sinks", "window", "size"), [(0, 0, 8), (2, 7, 16), (2, 7, 10), (0, 1, 9)])
def test_steps_are_those_by_hand(rule, sinks, window, size):
    """Means of attention, since birth; a turn stays inside of what is not protected, even where that is one slot."""
    method = longwave.TreeKV(tokens=size, sinks=sinks, window=window, index_rule=rule)
    k, v, q = draw(2, 60, seed=2)
    layer = new_layer(method)
    twins = {
        (b, h): by_hand(k[b, h], v[b, h], q[b, h * naive.G : (h + 1) * naive.G], method, 60)
        for b in range(2)
        for h in range(H)
    }
    for _ in drive(layer, k, v, q, [1] * 60):
        for (b, h), twin in twins.items():
            assert layer.dense.column("position")[b, h].tolist() == next(twin)


def test_the_score_is_a_mean_and_a_new_token_has_been_asked_once():
    k, v, q = draw(1, 20)
    layer = run(new_layer(longwave.TreeKV(tokens=30, **OPEN)), k, v, q, [12, *[1] * 8])
    held = held_by(layer)
    assert held.age()[0, 0].tolist() == list(range(20, 0, -1))
    mean = held.mean_mass() / naive.G  # a group's heads are summed
    assert bool(((mean > 0) & (mean <= 1)).all())


def test_a_round_is_a_knockout_of_twice_as_many():
    """c kept and c new tokens, in order: neighbours by twos; the round of many at once is that of one by one."""
    g = torch.Generator().manual_seed(0)
    for room in (1, 2, 3, 8):
        score = torch.rand(3, 2 * room, generator=g)
        pairs = score.view(3, room, 2)
        winners = torch.zeros(3, room, 2, dtype=torch.bool)
        winners[..., 0], winners[..., 1] = pairs[..., 0] > pairs[..., 1], pairs[..., 0] <= pairs[..., 1]
        assert torch.equal(knockout(score, room), winners.flatten(1))


@pytest.mark.parametrize("stride", RULES.values())
def test_rounds_are_turns(stride):
    g = torch.Generator().manual_seed(3)
    for room in (1, 2, 5, 8):
        for n in range(room, 41, 3):
            score = torch.rand(1, n, generator=g).round(decimals=1)  # equals: the left one goes
            held, at = list(range(room)), 0
            for new in range(room, n):
                held.append(new)
                held.pop(at + (1 if score[0, held[at]] > score[0, held[at + 1]] else 0))
                at = (at + stride) % room
            assert knockout(score, room, stride)[0].nonzero()[:, 0].tolist() == held


def test_density_halves_from_round_to_round():
    """c = 16 and 256 tokens, the left one always kept: of the last 16 eight, of the 16 before four, then two, one."""
    kept = knockout(-torch.arange(256.0)[None], 16)[0]
    assert [int(kept[256 - 16 * (i + 1) : 256 - 16 * i].sum()) for i in range(4)] == [8, 4, 2, 1]
    assert kept[0]  # the first is never beaten


def test_the_printed_rule_lets_every_third_pass_unopposed():
    kept = knockout(-torch.arange(12.0)[None], 8, RULES["printed"])[0]
    assert kept.nonzero()[:, 0].tolist() == [0, 2, 3, 5, 6, 8, 9, 11]


# after a prompt


def test_blocks_win_or_lose_together_by_what_the_last_block_looks_at():
    """Sinks 2, window 8: 40 tokens between are 10 blocks, of which 4 stay; of each pair the one that is looked at."""
    liked = [1, 2, 5, 7, 8]  # blocks; beside 0, 3, 4, 6, 9
    k, v, q = (torch.zeros(1, heads, 50, naive.D, dtype=torch.float64) for heads in (H, H, H * naive.G))
    for rank, block in enumerate(liked):
        k[:, :, 2 + 4 * block : 6 + 4 * block, 0] = 1 + 0.1 * rank
    q[:, :, 46:, 0] = 1 / SCALE
    q[:, :, :46, 0] = -9 / SCALE  # earlier queries say the opposite and have no say
    layer = run(new_layer(longwave.TreeKV(tokens=26, sinks=2, window=8, block=4)), k, v, q, [50])
    # 0 to 3, then 4 to 7: rounds (0 1) (2 3) (4 5) (6 7) -> 1 2 5 7; 8 and 9: (1 2) (5 7) -> 2 7 8 9
    expected = [0, 1, *(2 + 4 * block + i for block in (2, 7, 8, 9) for i in range(4)), *range(42, 50)]
    assert layer.dense.column("position")[0].tolist() == [expected] * H
    assert layer.turn.tolist() == [0]


@pytest.mark.parametrize("length", [33, 47, 64, 101])
@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize("size", [12, 17, 30])
def test_ragged_ends_keep_exactly_what_is_allowed(length, block, size):
    layer = run(new_layer(longwave.TreeKV(tokens=size, sinks=2, window=7, block=block)), *draw(2, length), [length])
    assert layer.dense.lengths == [size] * 2
    places = layer.dense.column("position")
    assert torch.equal(places, places.sort(-1).values)
    assert all(len(set(row)) == size for row in places.flatten(0, 1).tolist())


def test_the_turn_goes_on_after_a_prompt_and_its_bytes_are_counted(llama):
    method = longwave.TreeKV(tokens=20, sinks=2, window=8, block=4)
    memory = longwave.cache(llama, method)
    ids = tokens(2, 50)
    read_in(llama, memory, ids, [40])
    assert memory.nbytes == memory.method.nbytes(40, 2)
    assert memory.report().parts["turns"] == 3 * 2 * 8
    read_in(llama, memory, ids, [1, 1, 1])
    assert [layer.turn.tolist() for layer in memory.memory_layers()] == [[3, 3]] * 3
    read_in(llama, memory, ids, [5])
    assert [layer.turn.tolist() for layer in memory.memory_layers()] == [[0, 0]] * 3


def test_pages_take_the_winners(llama):
    memory = longwave.cache(
        llama, longwave.TreeKV(store=longwave.Kivi(bits=8, group=8), sinks=2, window=8, block=2), budget=0.06
    )
    read_in(llama, memory, tokens(1, 140), [120, *[1] * 20])
    layer = memory.layers[0]
    pages, span = layer.store.tokens[0], layer.bound.span
    assert pages >= 8
    assert pages // 8 * span + layer.dense.lengths[0] == 140


def test_slots_need_no_position_beyond_the_budget(llama):
    """720 tokens on a model of 512."""
    method = longwave.TreeKV(tokens=40, sinks=2, window=8, block=4, positions="slots")
    memory = longwave.cache(llama, method)
    got = read_in(llama, memory, tokens(1, 720), [*[100] * 7, *[1] * 20])
    assert torch.isfinite(got).all()
    assert memory.layers[0].dense.lengths == [40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(block=0), "block is a whole number of tokens, at least 1; got 0"),
        (dict(index_rule="line 16"), 'index_rule is "text" or "printed", got \'line 16\''),
        (dict(window=-1), "window is a whole number of tokens, at least 0; got -1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        longwave.TreeKV(**options)
