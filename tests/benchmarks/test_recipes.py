"""The committed recipes name methods, options and tasks that exist."""

from pathlib import Path

import pytest

from longwave.evals.asked import check_names
from longwave.evals.recipe import make_recipe
from longwave.evals.spec import parse_spec
from longwave.methods import METHODS

FOLDER = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_can_be_run(name):
    recipe = make_recipe(FOLDER / name, out="unused")
    assert check_names(recipe).keys() == set(recipe.tasks)


def test_the_family_is_whole():
    named = {parse_spec(method)[0] for method in make_recipe(FOLDER / "family.yaml").methods}
    can = {name for name, method in METHODS.items() if not method().beforehand()}  # speckv wants a draft
    assert named == can, "a method was added: measure it in benchmarks/family.yaml"
