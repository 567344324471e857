"""What every evicting method promises: which tokens stay, how many at each step, what they take, what comes back."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import longwave
from longwave.evals.fork import fork, prefill
from longwave.frame import Pass, Step
from longwave.methods.held import best
from longwave.store.tokens import capacity
from tests.conftest import into, left_padded, shape_of, tokens
from tests.methods import naive
from tests.methods.naive import G, H, by_mass, by_place, by_votes, draw, drive, limit

SMALL = dict(sinks=2, window=7)


@dataclass(frozen=True)
class Halved(longwave.Evicting):
    """A third party's method in few lines, and the lines of its twin: worth is the first channel of V, halved and cut
    down to whole numbers, so that many are equal."""

    name: ClassVar[str] = "halved"
    every: ClassVar[int] = 5

    def score(self, held):
        return torch.floor(held.v[..., 0] / 2)


def halved(head):
    return [float(token.v[0] / 2 // 1) for token in head.tokens]


# method, its twin's score, bytes of side columns that a token takes
POLICIES = {
    "streaming": (longwave.Streaming(**SMALL), by_place, 4),
    "snapkv": (longwave.SnapKV(**SMALL), by_votes, 4),
    "h2o": (longwave.H2O(**SMALL), by_mass, 8),
    "halved": (Halved(**SMALL), halved, 4),
    "streaming-tokens": (longwave.Streaming(tokens=20, **SMALL), by_place, 4),
    "h2o-tokens": (longwave.H2O(tokens=20, **SMALL), by_mass, 8),
    "no-sinks": (longwave.H2O(sinks=0, window=1), by_mass, 8),
}
COMINGS = {
    "prompt": [110],
    "steps": [1] * 110,
    "chunks": [40, 9, 1, 1, 1, 50, 8],
    "steps-after": [20, *[1] * 90],
}


@pytest.fixture(params=list(POLICIES))
def policy(request):
    return POLICIES[request.param]


@pytest.fixture(params=["streaming", "snapkv", "h2o", "streaming-tokens"])
def some(request):
    """Policies for what a whole model takes part in."""
    return POLICIES[request.param]


def budget_of(method, budget=0.3):
    return None if method.tokens is not None else budget


def new_layer(method, dtype=torch.float64, budget=0.3):
    return method.bind(naive.shape(dtype), None, budget_of(method, budget)).layer(0)


def run(layer, *rest):
    for _ in drive(layer, *rest):
        pass
    return layer


# which tokens stay


@pytest.mark.parametrize("coming", list(COMINGS))
@pytest.mark.parametrize("pads", [[0], [0, 31, 108]], ids=["alone", "padded"])
def test_the_tokens_that_stay_are_the_twins(policy, coming, pads):
    method, score, columns = policy
    valid = None if pads == [0] else torch.arange(110) >= torch.tensor(pads)[:, None]
    layer = new_layer(method)
    naive.check(layer, score, limit(method, 0.3, columns), *draw(len(pads), 110, seed=3), COMINGS[coming], valid)
    assert layer.dense.lengths[0] < 90


def test_padding_among_new_tokens_counts_as_none_for_a_row(policy):
    """Turns of different lengths: a row that gets one real token takes a step, whatever the others get."""
    method, score, columns = policy
    valid = torch.ones(3, 110, dtype=torch.bool)
    valid[1, 60:65] = valid[2, 60:66] = False
    valid[1, 90] = valid[0, 91] = False
    naive.check(
        new_layer(method), score, limit(method, 0.3, columns), *draw(3, 110), [60, 6, 1, 1, 20, 1, 1, 1, 19], valid
    )


@pytest.mark.parametrize("budget", [0.01, 0.5, 0.99])
def test_other_budgets(policy, budget):
    method, score, columns = policy
    naive.check(new_layer(method, budget=budget), score, limit(method, budget, columns), *draw(1, 60), [30, *[1] * 30])


def test_sinks_and_window_always_stay(policy):
    method, *_ = policy
    layer = new_layer(method, budget=0.01)
    seen = 0
    for size in COMINGS["chunks"]:
        run(layer, *draw(2, size, seed=seen, sharp=5), [size])
        seen += size
        places = layer.dense.column("position")
        assert torch.equal(places, places.sort(-1).values)
        for row in places.flatten(0, 1).tolist():
            assert row[: method.sinks] == list(range(method.sinks))
            assert row[-method.window :] == list(range(seen - method.window, seen))


def test_best_takes_the_earlier_of_equals_and_keeps_order():
    score = torch.tensor([[[1.0, 3, 2, 3, 1, 2, 1]], [[0.0, 0, 0, 0, 0, 0, 0]]])
    assert best(score, torch.tensor([4, 2])).tolist() == [[[1, 2, 3, 5]], [[0, 1, 2, 3]]]
    assert best(score, torch.tensor([5, 0]))[0].tolist() == [[0, 1, 2, 3, 5]]


# how many, and their bytes


def test_the_limit_is_what_the_budget_says(policy):
    method, _, columns = policy
    for budget in (0.01, 0.3, 0.77):
        bound = method.bind(naive.shape(), None, budget_of(method, budget))
        most = limit(method, budget, columns)
        assert [bound.limit(n) for n in range(300)] == [most(n) for n in range(300)]
        assert bound.limit_step(torch.arange(300)).tolist() == [most(n) for n in range(300)]


def test_the_budget_holds_at_every_step(policy):
    method, _, columns = policy
    most, bound = limit(method, 0.3, columns), new_layer(method).bound
    for sizes in COMINGS.values():
        layer, seen, last = bound.layer(0), 0, 0
        for size in sizes:
            run(layer, *draw(2, size, seed=seen), [size])
            seen += size
            (held,) = set(layer.dense.lengths)
            assert held == layer.held()[0]
            slack = method.every - 1 if size == 1 else 0
            assert most(seen) <= held + (seen - last) * 0 <= most(seen) + slack
            assert layer.rows == [seen] * 2
            assert layer.get_seq_length() == seen
            assert layer.nbytes <= bound.peak_bytes(seen, batch=2)
            last = seen


def test_bytes_are_exact_after_a_prompt(policy):
    method, _, columns = policy
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bound = method.bind(naive.shape(dtype, layers=2), None, budget_of(method))
        most = limit(method, 0.3, columns, dtype.itemsize)
        for length in (1, 9, 10, 64, 65, 200):
            for batch in (1, 3):
                layers = [bound.layer(i) for i in range(2)]
                for layer in layers:
                    run(layer, *draw(batch, length, dtype=dtype), [length])
                held = capacity(most(length)) * H * (2 * naive.D * dtype.itemsize + columns)
                queries = method.needs().queries * (H * G * naive.D * dtype.itemsize + 8)
                assert bound.layer_bytes(1, length) == held + queries
                assert (
                    sum(layer.nbytes for layer in layers) == bound.nbytes(length, batch) == batch * 2 * (held + queries)
                )


def test_bytes_of_a_models_cache(policy, models):
    """Sliding layers come on top, in transformers' own way, so at most."""
    method = policy[0]
    for name, exact in (("llama", True), ("gemma3", False)):
        model = models[name][0]
        for batch, length in ((1, 150), (3, 70)):
            memory = longwave.cache(model, method, budget_of(method))
            with torch.no_grad():
                model(tokens(batch, length), **into(memory))
            most = memory.method.nbytes(length, batch)
            assert memory.nbytes == most if exact else most / 2 < memory.nbytes <= most
            assert sum(x.nbytes for x in memory.memory_layers()) == batch * sum(
                memory.method.layer_bytes(i, length) for i in memory.method.shape.memory_layers
            )


def test_nothing_of_a_prompt_is_pinned(policy):
    k, v, q = draw(2, 150)
    layer = run(new_layer(policy[0]), k, v, q, [150])
    own = {x.untyped_storage().data_ptr() for tensors in layer.parts().values() for x in tensors}
    assert not own & {x.untyped_storage().data_ptr() for x in (k, v, q)}


def test_a_budget_of_all_keeps_all_and_observes_nothing(policy):
    method = policy[0]
    if method.tokens is not None:
        method = type(method)(**SMALL)
    bound = method.bind(naive.shape(), None, 1.0)
    layer = run(bound.layer(0), *draw(2, 90), COMINGS["chunks"])
    assert layer.dense.lengths == [90, 90]
    assert not layer.dense.columns
    assert layer.queries is None
    assert layer.nbytes == bound.nbytes(90, 2) == 2 * capacity(90) * H * 2 * naive.D * 8


def test_as_many_tokens_as_there_are_keep_all():
    for method, _, _ in POLICIES.values():
        if method.tokens is not None:
            layer = run(new_layer(method), *draw(1, 20), [15, *[1] * 5])
            assert layer.dense.lengths == [20]
            run(layer, *draw(1, 1), [1])
            assert layer.dense.lengths == [20]
            assert layer.rows == [21]


def test_a_size_is_kept_by_a_whole_generation(llama, some):
    method = some[0]
    size = int(300 * shape_of(llama).token_bytes * 3 * 0.7)
    memory = longwave.cache(llama, method, f"{size}B", max_tokens=300)
    with torch.no_grad():
        llama(tokens(1, 230), **into(memory))
        for i in range(70):
            assert memory.nbytes <= size
            llama(tokens(1, 1, seed=i), **into(memory))
    assert memory.nbytes <= size
    assert memory.report().ratio < 0.8
    assert memory.report().held == memory.layers[0].dense.lengths[0] < memory.report().tokens == 300


# rows


def test_a_row_does_not_depend_on_the_others(models, some):
    method, model, pads = some[0], models["llama"][0], [0, 13, 60]
    ids, mask = left_padded(3, 80, pads)
    options = dict(max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True)
    memory = longwave.cache(model, method, budget_of(method))
    together = model.generate(ids, attention_mask=mask, **into(memory), **options)
    for row, pad in enumerate(pads):
        own = longwave.cache(model, method, budget_of(method))
        alone = model.generate(ids[row : row + 1, pad:], **into(own), **options)
        assert torch.equal(together.sequences[row, 80:], alone.sequences[0, 80 - pad :])
        torch.testing.assert_close(together.logits[-1][row], alone.logits[-1][0], rtol=1e-3, atol=1e-3)
        for ours, theirs in zip(memory.memory_layers(), own.memory_layers(), strict=True):
            (held,) = theirs.dense.lengths
            assert ours.dense.lengths[row] == held
            assert torch.equal(ours.dense.column("position")[row, :, :held], theirs.dense.column("position")[0])


def test_a_fork_keeps_what_reading_keeps(policy, llama):
    """A dense cache that observed what the method needs, handed on."""
    method = policy[0]
    ids, mask = left_padded(3, 80, [0, 13, 60])
    read, empty = (longwave.cache(llama, method, budget_of(method)) for _ in range(2))
    fork(prefill(llama, ids, mask, empty.method.needs), empty)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        llama(ids, attention_mask=mask, position_ids=places, **into(read))
    for ours, theirs in zip(empty.memory_layers(), read.memory_layers(), strict=True):
        assert ours.rows == theirs.rows
        assert ours.dense.lengths == theirs.dense.lengths
        assert torch.equal(ours.dense.column("position"), theirs.dense.column("position"))
        assert ours.nbytes == theirs.nbytes
        assert ours._evicted == theirs._evicted


def test_rows_move_with_all_that_belongs_to_them(policy):
    method = policy[0]
    k, v, q = draw(3, 90)
    valid = torch.arange(90) >= torch.tensor([0, 30, 70])[:, None]
    layer = run(new_layer(method), k, v, q, [90], valid)
    order = torch.tensor([2, 0, 0])
    layer.batch_select_indices(order)
    (later_k, later_v, later_q) = draw(3, 40, seed=5)
    more = torch.cat([valid[order], torch.ones(3, 40, dtype=torch.bool)], 1)
    k, v, q = (torch.cat([x[order], y], 2) for x, y in ((k, later_k), (v, later_v), (q, later_q)))
    got = list(drive(layer, k, v, q, [1] * 40, more, start=90))
    other = new_layer(method)
    expected = list(drive(other, k, v, q, [90, *[1] * 40], more))[1:]
    assert layer.dense.lengths == other.dense.lengths
    assert torch.equal(layer.dense.column("position"), other.dense.column("position"))
    torch.testing.assert_close(torch.cat(got, 2), torch.cat(expected, 2), rtol=0, atol=1e-9)
    assert layer.nbytes == other.nbytes


def test_deepcopies_do_not_share(policy):
    layer = run(new_layer(policy[0]), *draw(2, 90), [90])
    twin, again = copy.deepcopy(layer), copy.deepcopy(layer)
    run(layer, *draw(2, 40, seed=5), [*[1] * 30, 10])
    more = draw(2, 30, seed=6)
    assert torch.equal(twin.dense.column("position"), again.dense.column("position"))
    got, expected = (torch.cat(list(drive(x, *more, [10, *[1] * 20])), 2) for x in (twin, again))
    assert torch.equal(got, expected)


def test_reset_forgets_what_was_evicted(policy):
    layer = run(new_layer(policy[0]), *draw(2, 90), [90])
    layer.reset()
    assert layer.nbytes == 0
    fresh = new_layer(policy[0])
    more = draw(3, 60, seed=6)
    got, expected = (torch.cat(list(drive(x, *more, [40, *[1] * 20])), 2) for x in (layer, fresh))
    assert torch.equal(got, expected)
    layer.reset()
    run(layer, *draw(1, 1), [1])
    layer.crop(-1)  # nothing was evicted since
    assert layer.rows == [0]


# crop


@pytest.mark.parametrize("name", [name for name, (method, *_) in POLICIES.items() if method.window > 5])
def test_crop_within_what_nothing_was_evicted_for(name):
    """The last eviction is as far as it goes. What is removed comes off as if it had never been given, but for what it
    gave others (h2o's mass) and the queries that it displaced (snapkv's)."""
    method, score, _ = POLICIES[name]
    layer = run(new_layer(method), *draw(2, 90), [90])
    twin = copy.deepcopy(layer)
    layer.activate_past_recording()
    assert layer.is_croppable
    more = draw(2, 5, seed=5)
    run(layer, *more, [5])
    assert layer.dense.lengths[0] == twin.dense.lengths[0] + 5
    layer.crop(-3)
    assert layer.rows == [92, 92]
    assert layer.get_seq_length() == 92
    run(twin, *(x[:, :, :2] for x in more), [2])
    assert layer.dense.lengths == twin.dense.lengths
    if score in (by_place, halved):
        assert torch.equal(layer.dense.column("position"), twin.dense.column("position"))
        for ours, theirs in zip(layer.materialize(), twin.materialize(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["streaming", "snapkv", "h2o", "halved"])
def test_the_end_of_a_long_pass_can_still_be_taken_back_while_recording(name):
    """Prompt lookup reads its first guesses with the prompt, and a pass longer than the window does not wait."""
    method, _, columns = POLICIES[name]
    most, layer = limit(method, 0.3, columns), new_layer(method)
    run(layer, *draw(2, 9), [9])
    layer.activate_past_recording()
    run(layer, *draw(2, 71, seed=5), [71])
    assert layer.dense.lengths == [most(80 - method.window) + method.window] * 2
    twin = copy.deepcopy(layer)
    with pytest.raises(ValueError, match="cannot remove the last 8 tokens: row 0 evicted others when it had seen 73"):
        layer.crop(-8)
    layer.crop(-4)
    assert layer.rows == [76, 76]
    assert layer.dense.lengths == [most(76)] * 2
    run(twin, *draw(2, 1, seed=6), [1])  # decided by going on instead
    assert twin.rows == [81, 81]
    twin.crop(0)
    assert set(twin.dense.lengths) <= {most(81), most(80) + 1}


def test_where_a_size_leaves_no_room_to_wait_a_cache_says_that_it_cannot_be_cropped(llama):
    for budget, croppable in ((0.3, True), ("60KB", False)):
        longest = {"max_tokens": 200} if isinstance(budget, str) else {}
        memory = longwave.cache(llama, longwave.Streaming(**SMALL), budget, **longest)
        memory.activate_past_recording()
        assert [layer.is_croppable for layer in memory.memory_layers()] == [croppable] * 3


def test_crop_beyond_an_eviction_is_refused_and_changes_nothing(policy, llama):
    method = policy[0]
    memory = longwave.cache(llama, method, budget_of(method))
    with torch.no_grad():
        llama(tokens(2, 90), **into(memory))
        before = [layer.dense.column("position").clone() for layer in memory.memory_layers()]
        with pytest.raises(
            ValueError, match="cannot remove the last 1 tokens: row 0 evicted others when it had seen 90"
        ):
            memory.crop(-1)
        assert not memory.layers[0].is_croppable
        assert memory.get_seq_length() == 90
        for layer, places in zip(memory.memory_layers(), before, strict=True):
            assert torch.equal(layer.dense.column("position"), places)
        llama(tokens(2, 4, seed=3), **into(memory))


def test_crop_where_nothing_was_evicted_yet(policy):
    method = policy[0]
    first = method.sinks + method.window
    layer = run(new_layer(method), *draw(2, 30), [first])
    layer.crop(-1)
    assert layer.dense.lengths == [first - 1] * 2
    with pytest.raises(ValueError, match="cannot remove 30 tokens"):
        layer.crop(-30)


def test_a_row_that_evicted_keeps_the_others_from_being_cropped(policy):
    """All or nothing: rows differ in what they can give back."""
    method = policy[0]
    valid = torch.arange(60) >= torch.tensor([0, 56])[:, None]
    layer = run(new_layer(method), *draw(2, 60), [60], valid)
    before = layer.dense.lengths
    with pytest.raises(ValueError, match="row 0 evicted"):
        layer.crop(-2)
    assert layer.dense.lengths == before


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sinks=-1), "sinks is a whole number of tokens, at least 0; got -1"),
        (dict(window=0), "window is a whole number of tokens, at least 1; got 0"),
        (
            dict(tokens=11, sinks=4, window=7),
            r"tokens is a whole number of tokens \(sinks \+ window \+ 1\), at least 12; got 11",
        ),
        (dict(tokens=80.0), "tokens is a whole number"),
        (dict(positions="relative"), 'positions are "true" or "slots", got \'relative\''),
        (dict(store="dense"), "store is a method of pages such as.*got Dense"),
        (dict(store="kivy"), "unknown method 'kivy'; did you mean 'kivi'"),
        (dict(store=4), "store is a method of pages.*got 4"),
        (dict(store=longwave.FourierPaper()), "store is a method of pages.*FourierPaper"),
        (dict(store=longwave.Streaming()), "store is a method of pages.*Streaming"),
        (dict(store_budget=0.2), "store_budget is the budget of the store, and there is none"),
        (dict(store="kivi", tokens=200), "pages are never opened again"),
        (dict(store="kivi", positions="slots"), "pages are never opened again"),
        (dict(store=longwave.Kivi(window=9)), "window is .*'s to say, and the store's decides nothing"),
        (dict(store=longwave.Kivi(sinks=9)), "sinks is .*'s to say, and the store's decides nothing"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    for method in (longwave.Streaming, longwave.H2O):
        with pytest.raises(ValueError, match=message):
            method(**options)


def test_a_budget_beside_tokens_is_refused(llama):
    with pytest.raises(ValueError, match="give a budget or tokens, not both"):
        longwave.cache(llama, longwave.Streaming(tokens=100), budget=0.5)


def test_a_mask_of_its_own_over_evicted_tokens_is_refused_and_the_cache_stays_usable(llama, policy):
    method = policy[0]
    memory = longwave.cache(llama, method, budget_of(method))
    twin = longwave.cache(llama, method, budget_of(method))
    with torch.no_grad():
        for made in (memory, twin):
            llama(tokens(1, 60), **into(made))
        with pytest.raises(NotImplementedError, match="4D attention mask"):
            llama(tokens(1, 4), **into(memory), attention_mask=torch.ones(1, 1, 4, 64, dtype=torch.bool))
        got, expected = (llama(tokens(1, 4, seed=2), **into(made)).logits for made in (memory, twin))
    assert torch.equal(got, expected)


# steps on the device


def step_of(layer, position):
    batch = layer.batch_size
    at = torch.tensor(layer.dense.lengths)
    return Step(
        rows=torch.arange(batch),
        at=at,
        seen=(at + 1)[:, None].int(),
        counts=torch.zeros(batch, dtype=torch.int32),
        total=torch.tensor(layer.rows),
        positions=torch.full((batch, 1), position),
        live=torch.ones(batch, dtype=torch.bool),
    )


@dataclass(frozen=True)
class Alike(longwave.Evicting):
    name: ClassVar[str] = "alike"

    def score(self, held):
        return torch.zeros(held.k.shape[:3])


@pytest.mark.parametrize("name", ["streaming", "h2o", "h2o-tokens", "streaming-tokens", "no-sinks", "alike"])
def test_a_step_on_the_device_evicts_what_a_pass_does(name):
    """Equals included: the earlier one of them stays."""
    method = Alike(**SMALL) if name == "alike" else POLICIES[name][0]
    passes, steps = (run(new_layer(method), *draw(2, 50), [50]) for _ in range(2))
    steps.reserve(30)
    k, v, q = draw(2, 30, seed=5)
    step = step_of(steps, 0)
    for i in range(30):
        now = slice(i, i + 1)
        (expected,) = drive(passes, k[:, :, now], v[:, :, now], q[:, :, now], [1])
        step.positions.fill_(50 + i)
        p = Pass(q[:, :, now], k[:, :, now], v[:, :, now], naive.SCALE, positions=step.positions, phase="step")
        torch.testing.assert_close(steps.run_step(p, step), expected, rtol=0, atol=1e-9)
        steps.stepped(1)
        step.at.add_(1)
        step.seen.add_(1)
        step.total.add_(1)
        assert steps.dense.lengths == passes.dense.lengths
        assert step.at.tolist() == passes.dense.lengths
        assert torch.equal(steps.dense.column("position"), passes.dense.column("position"))
    assert steps._evicted == passes._evicted
    steps.release()
    assert steps.nbytes == passes.nbytes


def test_slots_of_a_number_of_tokens_read_any_length_in_passes(llama):
    """There a position is a place in the cache: what is held and what a pass brings must not exceed the known ones."""
    shape = shape_of(llama)
    bound = longwave.Tova(**SMALL, tokens=30, positions="slots").bind(shape, None, None)
    assert bound.reach(100) is None
    assert bound.at_once(100) == 70
    snap = longwave.KNorm(**SMALL, tokens=30, positions="slots").bind(shape, None, None)
    assert snap.at_once(100) == 100 - 30 - (longwave.KNorm.every - 1)
    for other in (
        longwave.Tova(**SMALL, tokens=30).bind(shape, None, None),  # at true positions
        longwave.Tova(**SMALL, positions="slots").bind(shape, None, 0.5),  # what is held grows
    ):
        assert (other.reach(100), other.at_once(100)) == (100, None)
    assert bound.at_once(30) is None  # no room for a pass
    assert bound.reach(30) == 30


def test_generate_reads_beyond_the_known_positions_in_passes(llama, monkeypatch, caplog):
    monkeypatch.setattr(llama.config, "max_position_embeddings", 64)
    ids, options = tokens(1, 150), dict(max_new_tokens=5, do_sample=False, use_cache=True)

    def empty():
        return longwave.cache(llama, longwave.Streaming(**SMALL, tokens=24, positions="slots"))

    made = longwave.generate(llama, ids, cache=empty(), **options)
    assert not caplog.records  # none that says that the text is too long
    passes = llama.generate(ids, **into(empty()), prefill_chunk_size=40, **options)
    assert torch.equal(made, passes)
    with pytest.raises(ValueError, match=r"read 40 tokens a pass, or fewer"):
        longwave.generate(llama, ids, cache=empty(), prefill_chunk_size=41, **options)
    whole = longwave.generate(llama, ids, cache=longwave.cache(llama, "streaming"), **options)
    assert torch.equal(whole, llama.generate(ids, **into(longwave.cache(llama, "streaming")), **options))
