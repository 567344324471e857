"""The contract of methods that give something up: the budget holds, rows are alone, copies are copies, and nothing is
half done. tests/decode/test_steps.py has the steps of a StaticDecoder; what a method keeps is in tests/methods.
"""

import copy
import pickle

import pytest
import torch

from longwave.evals.fork import can_fork, fork, needs_of, prefill
from longwave.methods import Evicting, Remapped, Segmented
from longwave.methods.evicting import EvictingLayer
from longwave.methods.remapped import RemappedLayer
from longwave.methods.scoped import ScopedLayer
from longwave.methods.segmented import SegmentedLayer
from tests.conftest import build, crossed, into, left_padded, tokens
from tests.matrix import LOSSY
from tests.reading import check_state, read, read_in, state_of

LENGTH = 60
PADS = [0, 7, 41]
STEPS = (1,) * 24  # over several segments, and several evictions of every method


@pytest.fixture(scope="module")
def made():
    """In float64 rounding moves no code and no choice, so that equal is equal."""
    return {name: build(name, torch.float64) for name in ("llama", "gemma3")}


@pytest.fixture
def model(made):
    return made["llama"]


@pytest.fixture(params=["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def either(request, made):
    return made[request.param]


@pytest.fixture(params=list(LOSSY))
def make(request):
    return LOSSY[request.param]


def check_budget(memory):
    """As many bytes as the bound says at most, and as many tokens as the budget allows."""
    bound = memory.method
    layers = list(memory.memory_layers())
    assert memory.nbytes <= bound.peak_bytes(memory.get_seq_length(), layers[0].batch_size)
    for layer in layers:
        for row, (seen, dense) in enumerate(zip(layer.rows, layer.dense.lengths, strict=True)):
            if isinstance(layer, EvictingLayer):
                assert dense <= bound.most(seen, layer.position)
            elif isinstance(layer, SegmentedLayer) and bound.span:
                sinks, window, _ = bound.dense_tokens
                assert dense < sinks + window + bound.span
                assert seen == dense + layer.store.counts[row] * bound.span


def lost_something(memory):
    """Whether the method did what it is for: otherwise a test of it shows nothing."""
    layer = next(iter(memory.memory_layers()))
    if isinstance(layer, EvictingLayer):
        return min(layer._evicted) > 0
    if isinstance(layer, SegmentedLayer):
        return min(layer.store.tokens) > 0
    if isinstance(layer, ScopedLayer):
        return min(layer.rows) > layer.method.plain
    if isinstance(layer, RemappedLayer):
        return min(layer.rows) > layer.method.exact()
    return layer.summary is not None


# the budget


@pytest.mark.parametrize(
    ("prompt", "pads"),
    crossed(
        {"whole": (LENGTH,), "sevens": (7,) * 8 + (4,), "mixed": (1, 17, 1, 41)},
        {"even": [0, 0], "padded": [0, 23]},
        {("sevens", "padded"), ("mixed", "even")},
    ),
)
def test_the_budget_holds_at_every_pass(model, make, prompt, pads):
    check_every_pass(model, make, prompt, pads)


def test_the_budget_holds_beside_sliding_layers(made, make):
    check_every_pass(made["gemma3"], make, (7, 1, 52), [0, 23])


def check_every_pass(model, make, prompt, pads):
    memory = make(model)
    ids, mask = left_padded(2, LENGTH + 30, pads)
    end = 0
    for size in (*prompt, *STEPS, 2, 1, 3):
        end += size
        assert torch.isfinite(read(model, memory, ids[:, :end], mask)).all()
        if end > 23:  # the last row has its first token
            check_budget(memory)
    assert lost_something(memory)


@pytest.mark.parametrize("batch", [1, 2])
def test_bytes_are_those_that_were_promised(model, make, batch):
    """After a prompt in one call, to the byte."""
    for length in (1, 9, 10, 11, 27, 44, 63, 64, 65, 130):
        memory = make(model)
        read(model, memory, tokens(batch, length))
        assert memory.nbytes == memory.method.nbytes(length, batch)


def test_bytes_of_sliding_layers_are_not_above_the_promise(made, make):
    for length in (10, 27, 65, 130):
        memory = make(made["gemma3"])
        read(made["gemma3"], memory, tokens(2, length))
        others = memory.report().parts["other layers"]
        bound = memory.method
        assert memory.nbytes - others == bound.nbytes(length, 2) - 2 * bound.shape.sliding_bytes(length)
        assert others <= 2 * bound.shape.sliding_bytes(length)


# rows


def test_rows_are_alone(either, make):
    """Each row of a padded batch gets the logits that it gets by itself, in the prompt, in steps and in chunks."""
    ids, mask = left_padded(3, LENGTH + 40, PADS)
    memory = make(either)
    sizes = (*STEPS, 5, 1, 1, 9)
    got = read_in(either, memory, ids, (LENGTH, *sizes), mask)
    assert lost_something(memory)
    for row, pad in enumerate(PADS):
        alone = make(either)
        want = read_in(either, alone, ids[row : row + 1, pad:], (LENGTH - pad, *sizes))
        torch.testing.assert_close(got[row : row + 1, pad:], want, rtol=1e-6, atol=1e-6)
        for ours, theirs in zip(memory.memory_layers(), alone.memory_layers(), strict=True):
            assert ours.held()[row] == theirs.held()[0]


@pytest.mark.parametrize("real", [1, 2])
def test_rows_are_alone_where_new_tokens_are_padded(model, make, real):
    """Turns of different lengths: new tokens of a row behind padding, in the middle of a row."""
    if make is LOSSY["quest"] and real == 1:
        pytest.skip("a step reads some tokens, a pass of several all of them: for every row of it")
    ids, mask = left_padded(2, LENGTH + 16, [0, 0])
    mask[1, LENGTH : LENGTH + 6 - real] = 0
    memory = make(model)
    got = read_in(model, memory, ids, (LENGTH, 6, 1, 1, 1, 7), mask)
    alone, own = make(model), mask[1].bool()
    want = read_in(model, alone, ids[1:, own], (LENGTH, real, 1, 1, 1, 7))
    torch.testing.assert_close(got[1:, own], want, rtol=1e-6, atol=1e-6)


def test_a_pass_of_padding_alone(either, make):
    """The first chunk of a row that is padded by more than that."""
    ids, mask = left_padded(1, LENGTH + 20, [17])
    memory, alone = make(either), make(either)
    got = read_in(either, memory, ids, (10, LENGTH, 10), mask)
    want = read_in(either, alone, ids[:, 17:], (LENGTH - 7, 10))
    torch.testing.assert_close(got[:, 17:], want, rtol=1e-6, atol=1e-6)
    assert memory.nbytes == alone.nbytes


@pytest.mark.parametrize(
    ("kind", "name", "argument", "rows"),
    [
        pytest.param("llama", "reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0], id="reorder"),
        pytest.param("llama", "batch_select_indices", torch.tensor([1]), [1], id="select"),
        pytest.param("llama", "batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2], id="repeat"),
        pytest.param(
            "gemma3", "reorder_cache", torch.tensor([1, 1, 2]), [1, 1, 2], id="gemma3", marks=pytest.mark.slow
        ),
    ],
)
def test_rows_move(made, make, kind, name, argument, rows):
    """Moved half-way, a cache goes on as one that has read those rows from the start."""
    model = made[kind]
    ids, mask = left_padded(3, LENGTH + 30, PADS)
    memory, other = make(model), make(model)
    read_in(model, memory, ids, (LENGTH, *STEPS[:5]), mask)
    getattr(memory, name)(argument)
    ids, mask = ids[rows], mask[rows]
    read_in(model, other, ids, (LENGTH, *STEPS[:5]), mask)
    sizes = (*STEPS[5:15], 4, 1, 1)
    torch.testing.assert_close(
        read_in(model, memory, ids, sizes, mask), read_in(model, other, ids, sizes, mask), rtol=1e-6, atol=1e-6
    )
    check_state(state_of(memory), state_of(other), rtol=1e-6, atol=1e-6)
    assert memory.nbytes == other.nbytes


def test_a_row_that_has_no_middle_yet_stays_alone(model, make):
    """Beside a long one, which is compressed; then the long one goes, and all that was held for it."""
    ids, mask = left_padded(2, LENGTH, [0, LENGTH - 6])
    memory, alone = make(model), make(model)
    read(model, memory, ids, mask)
    memory.batch_select_indices(torch.tensor([1]))
    longer = torch.cat([ids[1:], tokens(1, 3)], 1)
    whole = torch.cat([mask[1:], torch.ones(1, 3, dtype=torch.long)], 1)
    got = read_in(model, memory, longer, (1, 2), whole)
    want = read_in(model, alone, longer[:, LENGTH - 6 :], (6, 1, 2))[:, 6:]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert memory.nbytes == alone.nbytes


# copies


def test_deepcopy_is_independent(model, make):
    ids = tokens(2, LENGTH + 20)
    memory = make(model)
    read_in(model, memory, ids, (LENGTH, 1, 1))
    before = state_of(memory)
    twin = copy.deepcopy(memory)
    read_in(model, memory, tokens(2, LENGTH + 40, seed=8), (20, *STEPS[:5]))
    check_state(state_of(twin), before)
    fresh = make(model)
    read_in(model, fresh, ids, (LENGTH, 1, 1))
    sizes = (*STEPS[:9], 5)
    assert torch.equal(read_in(model, twin, ids, sizes), read_in(model, fresh, ids, sizes))


def test_a_pickled_cache_goes_on(model, make):
    ids, mask = left_padded(2, LENGTH + 20, [0, 9])
    memory = make(model)
    read_in(model, memory, ids, (LENGTH, 1, 1), mask)
    stored = pickle.loads(pickle.dumps(memory))
    assert stored.method == memory.method
    assert stored.report() == memory.report()
    if memory.method.needs.unrotated or memory.method.needs.shifts:  # a pickle leaves the model behind
        before = state_of(stored)
        with pytest.raises(ValueError, match="came without its model"):
            read(model, stored, ids[:, : LENGTH + 3], mask)
        check_state(state_of(stored), before)
        return
    sizes = (*STEPS[:9], 5)
    assert torch.equal(read_in(model, stored, ids, sizes, mask), read_in(model, memory, ids, sizes, mask))


@pytest.mark.parametrize("pads", [[0, 0], [0, 9]], ids=["even", "padded"])
def test_a_fork_is_as_if_it_had_read_the_prompt(model, make, pads):
    ids, mask = left_padded(2, LENGTH + 30, pads)
    memory, empty = make(model), make(model)
    if not can_fork(empty):  # it reads otherwise than a dense cache: short prompts are the same
        with pytest.raises(ValueError, match=r"let the model read the prompt into it|give it the tokens"):
            fork(prefill(model, ids[:, :LENGTH], mask[:, :LENGTH], needs_of([empty])), empty)
        if isinstance(empty.method.method, Remapped):
            return None  # not even short ones
        ids, mask = ids[:, LENGTH - 20 :], mask[:, LENGTH - 20 :]
        return check_fork(model, memory, make(model), ids, mask, 20)
    check_fork(model, memory, empty, ids, mask, LENGTH)


def check_fork(model, memory, empty, ids, mask, length):
    read(model, memory, ids[:, :length], mask)
    forked = fork(prefill(model, ids[:, :length], mask[:, :length], needs_of([empty])), empty)
    but = ("_run",)  # a row's padding has no columns in a fork
    needs = memory.method.needs
    near = 1e-6 if needs.unrotated and needs.mass else 1e-9  # a float32 column, of sums in another order
    check_state(state_of(forked), state_of(memory), but, rtol=near, atol=near)
    assert forked.nbytes == memory.nbytes
    sizes = (*STEPS[:20], 5, 1)
    torch.testing.assert_close(
        read_in(model, forked, ids, sizes, mask), read_in(model, memory, ids, sizes, mask), rtol=1e-6, atol=1e-6
    )
    check_state(state_of(forked), state_of(memory), but, rtol=1e-6, atol=1e-6)


def test_reset_and_reuse(either, make):
    memory, fresh = make(either), make(either)
    read_in(either, memory, tokens(3, LENGTH + 9), (LENGTH, *STEPS[:9]))
    memory.reset()
    assert memory.get_seq_length() == 0
    assert all(layer.nbytes == 0 for layer in memory.memory_layers())
    ids, mask = left_padded(2, 50, [0, 9], seed=3)
    sizes = (33, *STEPS[:12], 5)
    assert torch.equal(read_in(either, memory, ids, sizes, mask), read_in(either, fresh, ids, sizes, mask))
    check_state(state_of(memory), state_of(fresh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits(make, dtype):
    model = build("llama", dtype)
    memory = make(model)
    ids, mask = left_padded(2, LENGTH + 30, [0, 9])
    assert torch.isfinite(read_in(model, memory, ids, (LENGTH, *STEPS[:12], 5, 1), mask)).all()
    check_budget(memory)


def test_filled_in_inference_mode_and_used_outside(model, make):
    """What is made there cannot be written to elsewhere."""
    ids, mask = left_padded(2, LENGTH + 40, [0, 9])
    memory, other = make(model), make(model)
    with torch.inference_mode():
        read_in(model, memory, ids, (LENGTH, 1), mask)
    read_in(model, other, ids, (LENGTH, 1), mask)
    sizes = (*STEPS[:12], 5, 1)
    twin = copy.deepcopy(memory)
    assert torch.equal(read_in(model, memory, ids, sizes, mask), read_in(model, other, ids, sizes, mask))
    twin.batch_select_indices(torch.tensor([1]))
    assert torch.isfinite(read_in(model, twin, ids[1:], sizes, mask[1:])).all()
    with torch.inference_mode():
        sizes = (1, 1, 4, 1)
        assert torch.equal(read_in(model, memory, ids, sizes, mask), read_in(model, other, ids, sizes, mask))


def test_prompt_lookup_keeps_the_budget(model, make):
    """Guesses are read and taken back, dense until they are decided."""
    ids = tokens(1, 25).repeat(1, 3)
    memory = make(model)
    out = model.generate(ids, **into(memory), max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=4)
    assert out.shape[1] == 75 + 40
    memory.crop(0)
    check_budget(memory)
    assert lost_something(memory)


# crop


@pytest.mark.parametrize(
    ("count", "pads"),
    crossed(
        {1: 1, 4: 4, 7: 7, 40: 40},
        {"even": [0, 0], "padded": [0, 9]},
        {("1", "padded"), ("4", "even"), ("7", "padded"), ("40", "even")},
    ),
)
def test_crop_or_a_refusal(model, make, count, pads):
    """What was held stays held but for the last tokens, or everything stays as it was in every layer."""
    ids, mask = left_padded(2, LENGTH + 30, pads)
    memory = make(model)
    read_in(model, memory, ids, (LENGTH, *STEPS[:11], 5, 1, 1), mask)
    before, twin, end = state_of(memory), copy.deepcopy(memory), memory.get_seq_length()
    refused = None
    try:
        memory.crop(-count)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert f"cannot remove the last {count} tokens" in refused
        assert "deepcopy" in refused
        check_state(state_of(memory), before)
        assert torch.equal(read(model, memory, ids[:, : end + 2], mask), read(model, twin, ids[:, : end + 2], mask))
        return
    assert memory.get_seq_length() == end - count
    for now, was in zip(state_of(memory), before, strict=True):
        assert now["rows"] == [n - count for n in was["rows"]]
        held = [was["lengths"][row] - count for row in range(2)]
        assert now["lengths"] == held
        for name in now.keys() & {"k", "v", "position", "mass"}:
            for row in range(2):
                kept = held[row] + (now["middle"][row] if name in "kv" else 0)
                assert torch.equal(now[name][row, :, :kept], was[name][row, :, :kept])
    check_budget(memory)
    assert torch.isfinite(read_in(model, memory, ids, (1, 1, 4, 1), mask)).all()


def test_a_pass_can_be_taken_back_while_the_past_is_recorded(model, make):
    """As if its last tokens had never come, whatever the method would have made of them."""
    ids, mask = left_padded(2, LENGTH + 20, [0, 9])
    guess = ids.roll(2, 0)
    memory, other = make(model), make(model)
    read(model, memory, ids[:, :LENGTH], mask)
    read(model, other, ids[:, :LENGTH], mask)
    memory.activate_past_recording()
    other.activate_past_recording()
    watches = memory.method.needs.watches or memory.method.needs.queries
    for start in (LENGTH, LENGTH + 5, LENGTH + 10):
        part = torch.cat([ids[:, : start + 2], guess[:, start + 2 : start + 5]], dim=1)
        read(model, memory, part, mask)
        memory.crop(-3)
        read(model, other, ids[:, : start + 2], mask)
        other.crop(0)
        if watches:  # what removed tokens gave has been given, and the queries that they pushed out are gone
            assert [layer.rows for layer in memory.layers] == [layer.rows for layer in other.layers]
            other = copy.deepcopy(memory)
        check_state(state_of(memory), state_of(other), rtol=1e-6, atol=1e-6)
        got, want = (read(model, m, ids[:, : start + 5], mask) for m in (memory, other))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 15])
def test_a_crop_forgets_what_removed_keys_did_to_a_summary(model, count):
    """They would lead later queries astray."""
    ids = tokens(1, 64)
    memory, other = LOSSY["quest"](model), LOSSY["quest"](model)
    read(model, other, ids[:, :41])
    read(model, memory, ids[:, :41])
    read(model, memory, torch.cat([ids[:, :41], tokens(1, count, seed=9)], 1))
    memory.crop(-count)
    check_state(state_of(memory), state_of(other))
    assert torch.equal(read_in(model, memory, ids, STEPS[:20]), read_in(model, other, ids, STEPS[:20]))


def test_the_table_has_every_method():
    """A method that is registered belongs here, in a form that loses something."""
    from longwave.methods import METHODS

    model = build("llama")
    bound = {type(make(model).method.method).__mro__[0] for make in LOSSY.values()}
    for method in METHODS.values():
        if method.name != "dense":
            assert any(issubclass(one, method) for one in bound), method.name
    assert any(issubclass(one, Evicting) for one in bound)
    assert any(issubclass(one, Segmented) for one in bound)
