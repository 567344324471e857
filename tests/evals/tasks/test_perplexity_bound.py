import math

import pytest

from longwave.evals.task import Setting
from longwave.evals.tasks import get_task
from longwave.evals.tasks.perplexity import Perplexity
from longwave.evals.tasks.perplexity_bound import PerplexityBound


def test_windows_are_those_of_perplexity(tokenizer):
    """Masks are drawn by the run's seed and the window, so that lengths differ in their context alone."""
    given = {"lengths": (80, 120), "scored": 20, "windows": 2, "text": "pydoc"}
    made = PerplexityBound(**given).samples(Setting(tokenizer, seed=7))
    plain = Perplexity(**given).samples(Setting(tokenizer, seed=7))
    assert [(x.id, x.ids, x.context) for x in made] == [(x.id, x.ids, x.context) for x in plain]
    assert [x.meta["seed"] - x.meta["window"] for x in made] == [7] * len(made)
    assert [{k: v for k, v in x.meta.items() if k != "seed"} for x in made] == [x.meta for x in plain]


def test_the_score_is_exp_of_the_mean_over_tokens():
    rows = [{"score": 2.0, "scored": 30}, {"score": 4.0, "scored": 10}]
    assert PerplexityBound().total(rows) == pytest.approx(math.exp(2.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": 0}, "masks is a whole number of passes a window, at least 1; got 0"),
        ({"scored": 0}, "scored is a whole number"),
        ({"lengths": (64,)}, "leaves no context before 64 scored tokens"),
        ({"mode": "stream"}, "no option 'mode'"),
        ({"step": 1}, "no option 'step'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        get_task("perplexity-bound", **options)
