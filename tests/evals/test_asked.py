import pytest

from longwave.evals.asked import check_names
from longwave.evals.evaluation import evaluate
from longwave.evals.tasks import get_task
from tests.evals.recipes import recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["furier"]}, "unknown method 'furier'; did you mean 'fourier'?"),
        ({"methods": ["fourier:segmnt=3"]}, "fourier has no option 'segmnt'; did you mean 'segment'?"),
        ({"methods": ["fourier:_kept=3"]}, "no option '_kept'"),
        ({"methods": ["fourier:profile=a.json"]}, "no option 'profile'"),
        ({"methods": ["fourier:budget=lots"]}, "got 'lots'"),
        ({"methods": ["fourier:budget=0.25,0.5"]}, "got (0.25, 0.5)"),
        ({"methods": ["fourier:budget=0"]}, "a budget is a fraction"),
        ({"methods": ["fourier:segment=12"]}, "segment is a multiple of 8, got 12"),
        ({"methods": ["fourier-paper:states=7"]}, "states must be even; got 7"),
        ({"methods": ["fourier-paper:segment=8"]}, "fourier-paper has no option 'segment'"),
        ({"tasks": ["nedle"]}, "unknown task 'nedle'; did you mean 'needle'?"),
        ({"tasks": ["needle:lenghts=180"]}, "needle has no option 'lenghts'; did you mean 'lengths'?"),
        ({"tasks": ["needle:lengths=abc"]}, "lengths are ints separated by commas, got 'abc'"),
        ({"tasks": ["needle:"]}, 'got "needle:"'),
        ({"tasks": ["needle:lengths"]}, 'an option is NAME=VALUE, got "lengths"'),
        ({"tasks": ["needle:depths=1.5"]}, "depths are shares from 0 to 1, got 1.5"),
    ],
    ids=repr,
)
def test_names_are_checked_before_a_model_is_loaded(changes, message):
    def never(*arguments):
        pytest.fail("loaded a model")

    with pytest.raises(ValueError) as error:
        evaluate(recipe(**changes), never)
    assert message in str(error.value)


def test_tasks_keep_their_labels():
    tasks = check_names(recipe(tasks=["needle:lengths=180,200", "needle"]))
    needle = get_task("needle", lengths=(180, 200)), None
    assert tasks == {"needle:lengths=180,200": needle, "needle": (get_task("needle"), None)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("needle:question=with", "needle:question=with: the question of a task is one of after, inside; got 'with'"),
        ("needle:question=1", "is one of after, inside; got 1"),
        ("divergence:question=inside", "divergence asks no question, so it takes no option question"),
    ],
)
def test_the_question_of_a_task(spec, message):
    with pytest.raises(ValueError, match=message):
        check_names(recipe(tasks=[spec]))
