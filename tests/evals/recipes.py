"""Recipes of tests."""

from longwave.evals.recipe import Recipe

SMALL = "segment=16,window=16"


def recipe(**changes):
    return Recipe(**{"out": "out", "methods": ["dense"], "tasks": ["needle"], **changes})
