"""The frontier's bytes: those of the methods as they are, from the profile that ships."""

import pytest

from benchmarks import frontier
from longwave.evals.spec import parse_spec


@pytest.mark.parametrize("spec", ["fourier:budget=0.1", "fourier:budget=0.25,plan=bits", "kivi:budget=0.25"])
def test_the_middle_takes_what_the_budget_says(spec):
    budget = parse_spec(spec)[1]["budget"]
    for context in (3000, 7000):
        assert 0.9 * budget < frontier.middle_ratio(spec, context) < budget + 0.001  # what names the channels is fixed


def test_the_paper_takes_its_own():
    assert 0.3 < frontier.middle_ratio("fourier-paper", 7000) < frontier.middle_ratio("fourier-paper", 3000)


def test_rows_of_options_that_are_gone_are_left_out():
    rows = frontier.read([frontier.HERE / "divergence.jsonl"])
    earlier = frontier.read([frontier.HERE / "before.jsonl"]).items()
    rows |= {(frontier.BEFORE + spec, context): group for (spec, context), group in earlier}
    families = {frontier.family(spec) for spec, _ in rows}
    assert families == {None, *frontier.FAMILIES}
    gone = {key: group for key, group in rows.items() if frontier.family(key[0]) is None}
    assert all("states=" in spec or "keep=" in spec or "bits" in spec for spec, _ in gone)
    assert frontier.summary(gone) == []
