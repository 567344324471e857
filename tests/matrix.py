"""Every method, in a form that changes nothing, for the shared contract in test_matrix.py.

A new method adds a line: its name and a function from a model to an empty cache with the budget at 1.
"""

import longwave
from tests.conftest import random_profile

IDENTITY = {
    "dense": lambda model: longwave.cache(model, "dense"),
    # all channels kept: segments are cut, nothing is projected
    "fourier-kept": lambda model: longwave.cache(
        model, longwave.Fourier(keep=1.0, states=2, segment=8, sinks=2, window=8)
    ),
    # nothing kept, as many states as tokens: every channel goes through the basis and comes back whole
    "fourier-states": lambda model: longwave.cache(
        model, longwave.Fourier(keep=0.0, states=7, segment=7, sinks=3, window=5)
    ),
    # a plan that can afford everything
    "fourier-planned": lambda model: longwave.cache(
        model, longwave.Fourier(segment=8, sinks=2, window=8), budget=1.0, profile=random_profile(model)
    ),
    "kivi": lambda model: longwave.cache(model, longwave.Kivi(group=8, sinks=2, window=8), budget=1.0),
}
