import re
import warnings
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

import longwave
from longwave.budget import DoesNotFit, human, parse_budget
from longwave.build import expect
from longwave.plan import plan, planner
from tests.conftest import into, random_profile, shape_of, tokens

SEGMENTS = longwave.Fourier(segment=16, sinks=2, window=16)
PERIOD = longwave.FourierPaper(keep=0.3, states=8, sinks=2, window=16, reserve=32)
LONGEST = 300


def fill(memory, lengths, batch=1):
    """Give every layer noise up to each of `lengths` in turn; yields the bytes held after each."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for length in lengths:
        for index in range(len(memory.layers)):
            new = torch.randn(2, batch, 2, length - held, 8, generator=generator)
            memory.update(new[0], new[1], index)
            if isinstance(memory.layers[index], longwave.MemoryLayer):
                memory.layers[index].crop(0)  # nothing is removed; the layer settles as after a forward pass
        held = length
        yield memory.report().nbytes


def build(model, method, budget, max_tokens=LONGEST, profile=True, **options):
    profile = random_profile(model) if profile else None
    return longwave.cache(model, method, budget, profile, max_tokens=max_tokens, **options)


def smallest(model, method, **options):
    with pytest.raises(ValueError, match="the smallest that fourier can do") as refused:
        build(model, method, "1B", **options)
    return int(re.search(r"\((\d+) bytes\)", str(refused.value))[1])


def share_kept(memory):
    return torch.stack([table for pair in memory.method.kept for table in pair]).float().mean()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.25, (0.25, None)),
        (1, (1.0, None)),
        ("0.25", (0.25, None)),
        (".5", (0.5, None)),
        ("1e-1", (0.1, None)),
        ("25%", (0.25, None)),
        (" 12.5 % ", (0.125, None)),
        ("100%", (1.0, None)),
        ("700B", (None, 700)),
        ("2KB", (None, 2000)),
        ("2KiB", (None, 2048)),
        ("512MiB", (None, 512 * 2**20)),
        ("512 mib", (None, 512 * 2**20)),
        ("1.5GB", (None, 1_500_000_000)),
        ("2GiB", (None, 2**31)),
    ],
)
def test_budgets_that_can_be_read(given, expected):
    assert parse_budget(given) == expected


@pytest.mark.parametrize(
    "given",
    [
        *(0, -0.25, 1.5, 512, float("nan"), float("inf"), True, None, [0.25], b"0.25"),
        *("", "GB", "%", "-0.25", "0", "1.01", "0%", "150%", "0,25", "0.25 of it", "12 parsecs", "512M", "nan", "-2GB"),
        *("0MiB", "0.5B", "1e999GB", "1e999"),
    ],
)
def test_wrong_budgets_are_named(given):
    with pytest.raises(ValueError, match=re.escape(repr(given))):
        parse_budget(given)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (5 * 2**30, "5 GiB")]
)
def test_sizes_for_people(size, text):
    assert human(size) == text


STEPS = [1, 7, LONGEST]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("over", [0, 9_000, 40_000])
def test_size_is_never_exceeded(llama, step, over):
    size = smallest(llama, SEGMENTS) + over
    memory = build(llama, SEGMENTS, f"{size}B")
    assert max(fill(memory, [*range(step, LONGEST, step), LONGEST])) <= size


@pytest.mark.parametrize("step", STEPS)
def test_size_covers_one_period(llama, step):
    size = PERIOD.bind(shape_of(llama), random_profile(llama), None).peak_bytes(LONGEST)
    memory = build(llama, PERIOD, f"{size}B")
    assert max(fill(memory, [*range(step, LONGEST, step), LONGEST])) <= size


@pytest.mark.parametrize("longest", [5, 33, 34, 49, 50, 83, 84, 200])
def test_size_is_never_exceeded_whatever_the_length(llama, longest):
    size = smallest(llama, SEGMENTS, max_tokens=longest) + 3_000
    memory = build(llama, SEGMENTS, f"{size}B", longest)
    assert max(fill(memory, range(1, longest + 1))) <= size


@pytest.mark.parametrize("longest", [17, 18, 81, 82, 145, 146, 200])
def test_size_covers_the_open_segment_on_the_way(llama, longest):
    """A segment that closes gives memory back, so the last length is not always the largest."""
    long = longwave.Fourier(segment=64, sinks=2, window=16)
    size = smallest(llama, long, max_tokens=longest) + 3_000
    assert max(fill(build(llama, long, f"{size}B", longest), range(1, longest + 1))) <= size


@pytest.mark.parametrize("turn", [1, 50])
def test_size_covers_what_a_turn_unpacks(llama, turn):
    """More than EXPAND query rows over pages unpack a row of a layer, beside all that is held."""
    size = smallest(llama, SEGMENTS, batch=2) + 3_000
    memory = build(llama, SEGMENTS, f"{size}B", batch=2)
    with torch.no_grad():
        for start, count in ((0, 250), *((at, turn) for at in range(250, LONGEST, turn))):
            llama(tokens(2, count, seed=start), **into(memory))
            report = memory.report()
            assert report.nbytes + report.scratch <= size
    assert (report.scratch > 0) == (turn > 1)


@pytest.mark.parametrize("kind", ["measured", "uniform", "bits"])
def test_a_size_plans_no_more_than_a_fraction(llama, monkeypatch, kind):
    """It may take three times as long to build, so counted in work: options are costed and put in order once."""
    counts = Counter()

    def counted(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **b: counts.update([name]) or plain(*a, **b))

    for name in ("units", "lower_hull", "key_code", "value_code"):
        counted(planner, name)
    counted(planner.Menu, "__init__")
    spent = []
    for budget, longest in ((0.7, None), ("100KB", LONGEST)):
        planner.menu.cache_clear()
        counts.clear()
        build(llama, longwave.Fourier(plan=kind, segment=16, sinks=2, window=16), budget, longest)
        assert counts["units"] == 3  # a layer each
        assert counts.pop("__init__") == 1
        spent.append(dict(counts))
    assert spent[0] == spent[1]


def test_a_size_lays_out_no_more_pages_than_there_are_codes(llama):
    plan._sizes.cache_clear()
    build(llama, longwave.Kivi(group=8, sinks=2, window=16), "100KB", profile=None)
    assert plan._sizes.cache_info().misses <= 8  # pairs of bits
    plan._sizes.cache_clear()
    build(llama, SEGMENTS, "100KB")
    assert plan._sizes.cache_info().misses <= 3 * 26  # layers, and what the search binds


def test_a_size_binds_no_more_than_it_needs(llama, monkeypatch):
    bound, plain = [], longwave.Fourier.bind

    def bind(self, shape, profile, budget):
        bound.append(budget)
        return plain(self, shape, profile, budget)

    monkeypatch.setattr(longwave.Fourier, "bind", bind)
    build(llama, SEGMENTS, "10MB")
    assert bound == [1.0]
    bound.clear()
    build(llama, SEGMENTS, "100KB")
    assert bound[0] == 1.0
    assert len(bound) <= 26
    assert len(set(bound)) == len(bound)


def test_size_covers_all_rows(llama):
    size = smallest(llama, SEGMENTS, batch=3) + 20_000
    memory = build(llama, SEGMENTS, f"{size}B", batch=3)
    assert max(fill(memory, range(1, LONGEST + 1), batch=3)) <= size


def test_size_covers_sliding_layers(models):
    model = models["gemma3"][0]
    size = smallest(model, SEGMENTS)
    memory = build(model, SEGMENTS, f"{size}B")
    assert max(fill(memory, [100, *range(101, LONGEST + 1)])) <= size


@pytest.mark.parametrize("over", [0, 5_000, 12_345, 25_000, 60_000, 10**9])
def test_size_takes_the_most_that_fits(llama, over):
    size = smallest(llama, SEGMENTS) + over
    shape, profile = shape_of(llama), random_profile(llama)
    plans = [SEGMENTS.bind(shape, profile, fraction / 64) for fraction in range(4, 65)]
    fitting = [plan.page_fraction() for plan in plans if plan.peak_bytes(LONGEST) <= size]
    assert build(llama, SEGMENTS, f"{size}B").method.page_fraction() >= fitting[-1]


def test_smallest_size_named_is_the_smallest(llama):
    size = smallest(llama, SEGMENTS)
    assert share_kept(build(llama, SEGMENTS, f"{size}B")) == 0
    with pytest.raises(ValueError, match=f"{size} bytes"):
        build(llama, SEGMENTS, f"{size - 1}B")


def test_size_that_holds_everything_needs_no_profile(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory = longwave.cache(llama, SEGMENTS, "10MB")
    assert memory.method.page_fraction() == 1


def test_default_length_is_the_models_context(llama):
    memory = longwave.cache(llama, SEGMENTS, "300KB", random_profile(llama))
    assert memory.layers[0].max_tokens == llama.config.max_position_embeddings
    assert memory.layers[0].get_max_length() == llama.config.max_position_embeddings


def test_longer_input_than_the_size_is_for_is_refused(llama):
    memory = build(llama, SEGMENTS, "100KB", 50)
    list(fill(memory, [30, 50]))
    with pytest.raises(ValueError, match="for 50 tokens and 51 were given"):
        list(fill(memory, [1]))
    with pytest.raises(ValueError, match="for 50 tokens and 60 were given"):
        list(fill(build(llama, SEGMENTS, "100KB", 50), [60]))


def test_more_rows_than_the_size_is_for_are_refused(llama):
    memory = build(llama, SEGMENTS, "100KB", 50, batch=2)
    with pytest.raises(ValueError, match="rows"):
        list(fill(memory, [50], batch=3))


def test_size_needs_a_length(llama, monkeypatch):
    monkeypatch.setitem(vars(llama.config), "max_position_embeddings", None)
    with pytest.raises(ValueError, match="give max_tokens"):
        longwave.cache(llama, SEGMENTS, "1MB", random_profile(llama))
    assert longwave.cache(llama, SEGMENTS, "1MB", random_profile(llama), max_tokens=100)


@pytest.mark.parametrize("budget", [None, 0.5])
def test_length_belongs_to_a_size(llama, budget):
    with pytest.raises(ValueError, match=r"max_tokens .*goes with a budget given as a size"):
        build(llama, SEGMENTS, budget, 100)


@pytest.mark.parametrize("longest", [0, -5, 1.5, True])
def test_lengths_that_cannot_be(llama, longest):
    with pytest.raises(ValueError, match=f"max_tokens is a whole number of tokens, at least 1; got {longest}"):
        build(llama, SEGMENTS, "1MB", longest)


@pytest.mark.parametrize("fraction", [0.0625, 0.13, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_fraction_bounds_what_more_context_costs(llama, fraction):
    memory = longwave.cache(llama, SEGMENTS, fraction, random_profile(llama))
    # at these lengths the same 18 tokens are dense, so the difference is the middle alone
    before, after = fill(memory, [2 + 16 + 16, 2 + 16 + 16 * 11])
    dense = 16 * 10 * shape_of(llama).token_bytes * len(memory.layers)
    head = 1 / (len(memory.layers) * 2)  # a plan decides head by head
    assert fraction - head < (after - before) / dense <= fraction


def test_fraction_below_the_smallest_plan_is_refused(llama):
    # of 1,024 bytes a head and segment: an int8 mean of 8 channels and its gain, for K and V, each in 16 bytes
    with pytest.raises(ValueError, match=r"0.062 is less than fourier can do.* takes 0.0625"):
        longwave.cache(llama, SEGMENTS, 0.062, random_profile(llama))


def test_size_only_checks_a_method_that_takes_no_budget(llama):
    method = longwave.FourierPaper(keep=0.5, states=8, sinks=2, window=16)
    peak = method.bind(shape_of(llama), random_profile(llama), None).peak_bytes(LONGEST)
    assert share_kept(build(llama, method, f"{peak}B")) == 0.5
    with pytest.raises(ValueError, match=rf"cannot hold 1 x 300 tokens: .* takes .*\({peak} bytes\)"):
        build(llama, method, f"{peak - 1}B")


@pytest.mark.parametrize("budget", [0.5, "50%", 0.999])
def test_dense_refuses_a_fraction(llama, budget):
    with pytest.raises(ValueError, match="dense keeps everything"):
        longwave.cache(llama, "dense", budget)


def test_dense_accepts_what_it_needs(llama):
    assert longwave.cache(llama, "dense", 1.0)
    with pytest.raises(ValueError, match=r"smallest that dense can do is") as refused:
        longwave.cache(llama, "dense", "1KB", max_tokens=LONGEST)
    size = int(re.search(r"\((\d+) bytes\)", str(refused.value))[1])
    memory = longwave.cache(llama, "dense", f"{size}B", max_tokens=LONGEST)
    assert max(fill(memory, range(1, LONGEST + 1))) == size


# tokens that are coming


PROMPT = {"input_ids": tokens(2, 90), "attention_mask": torch.ones(2, 90, dtype=torch.long)}


def test_generate_spends_a_size_on_the_tokens_that_are_coming(llama):
    size = f"{smallest(llama, SEGMENTS, max_tokens=512) + 30_000}B"
    by_window, known = (longwave.cache(llama, SEGMENTS, size, random_profile(llama)) for _ in range(2))
    before = by_window.method
    longwave.generate(llama, **PROMPT, **into(known), max_new_tokens=30, do_sample=False)
    llama.generate(**{name: x[:1] for name, x in PROMPT.items()}, **into(by_window), max_new_tokens=30)
    assert by_window.method == before
    assert known.method.budget > by_window.method.budget
    assert known.method == build(llama, SEGMENTS, size, 90 + 29, batch=2).method
    assert known.report().nbytes <= int(size[:-1])
    assert [(layer.max_tokens, layer.max_rows) for layer in known.memory_layers()] == [(119, 2)] * 3


def test_what_is_coming_is_asked_anew_once_a_cache_is_empty(llama):
    memory = longwave.cache(llama, SEGMENTS, "130KB", random_profile(llama))
    one = {name: x[:1] for name, x in PROMPT.items()}
    longwave.generate(llama, **one, **into(memory), max_new_tokens=200, do_sample=False)
    long = memory.method
    with pytest.raises(ValueError, match="computed for 289 tokens"):  # it holds the last ones still
        longwave.generate(llama, tokens(1, 290 + 60), **into(memory), max_new_tokens=60, do_sample=False)
    memory.reset()
    longwave.generate(llama, **one, **into(memory), max_new_tokens=5, do_sample=False)
    assert memory.method.budget > long.budget


def test_what_the_caller_said_is_coming_stays(llama):
    memory = build(llama, SEGMENTS, "60KB", 200)
    before = memory.method
    longwave.generate(llama, tokens(1, 90), **into(memory), max_new_tokens=5, do_sample=False)
    assert memory.method is before
    memory.reset()
    with pytest.raises(ValueError, match="computed for 200 tokens"):
        longwave.generate(llama, tokens(1, 190), **into(memory), max_new_tokens=20, do_sample=False)


def test_a_size_too_small_for_what_is_coming_changes_nothing(llama):
    size = smallest(llama, SEGMENTS, max_tokens=512)
    memory = longwave.cache(llama, SEGMENTS, f"{size}B", random_profile(llama))
    before = memory.method
    with pytest.raises(DoesNotFit, match="cannot hold 4 x 512 tokens: the smallest that fourier can do") as refused:
        expect(llama, memory, 512, rows=4)
    assert memory.method is before
    expect(llama, build(llama, SEGMENTS, f"{refused.value.needed}B", None), 512, rows=4)
    with pytest.raises(DoesNotFit):
        expect(llama, build(llama, SEGMENTS, f"{refused.value.needed - 1}B", None), 512, rows=4)


def test_a_window_that_does_not_fit_says_how_to_name_fewer_tokens(llama):
    with pytest.raises(DoesNotFit, match=r"cannot hold 1 x 512 tokens, this model's window \(max_tokens= says"):
        longwave.cache(llama, SEGMENTS, "1KB", random_profile(llama))


def test_every_method_names_bytes_that_would_do(llama):
    for method in (SEGMENTS, PERIOD, longwave.Kivi(group=8, sinks=2, window=16), "streaming", "h2o", "quest", "dense"):
        with pytest.raises(DoesNotFit) as refused:
            build(llama, method, "1B", profile=method in (SEGMENTS, PERIOD))
        for size in (refused.value.needed - 1, refused.value.needed):
            with nullcontext() if size == refused.value.needed else pytest.raises(DoesNotFit):
                build(llama, method, f"{size}B", profile=method in (SEGMENTS, PERIOD))
