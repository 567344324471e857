"""What several files of tests of the evaluation share."""

from array import array

import pytest

import longwave
from longwave.evals import tasks
from tests.conftest import random_profile, tokens
from tests.evals import made_up
from tests.evals.samples import sample

OPTIONS = {"segment": 16, "sinks": 2, "window": 16}


@pytest.fixture
def made_up_tasks(monkeypatch):
    for name, task in made_up.TASKS.items():
        monkeypatch.setitem(tasks.TASKS, name, task)


@pytest.fixture
def loader(llama, tokenizer):
    return lambda model, device, dtype: (llama, tokenizer)


@pytest.fixture
def makers(llama):
    profile = random_profile(llama)
    return {
        "dense": lambda rows: longwave.cache(llama, "dense"),
        "fourier": lambda rows: longwave.cache(llama, "fourier", 0.1, profile, **OPTIONS),
    }


@pytest.fixture
def mixed():
    """Rows of several lengths, three of which share a context."""
    alone = [sample(f"alone{n}", n, n - 7, seed=n) for n in (150, 131, 122)]
    shared = [sample(f"shared{n}", 120, 100, seed=5) for n in range(3)]
    for number, one in enumerate(shared):
        one.ids[100:] = array("i", tokens(1, 8 + 3 * number, seed=number + 9)[0].tolist())
    return [*alone, *shared]
