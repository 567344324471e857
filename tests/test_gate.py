"""The regression gate must fail when a number moves: `make quality` itself takes minutes and data."""

import copy
import json

import pytest

from benchmarks import gate

RECORDED = json.loads((gate.HERE / "gate.json").read_text())


def test_recorded_numbers_are_inside_their_own_bands():
    rows, well = gate.check(RECORDED, copy.deepcopy(RECORDED))
    assert well
    assert {row[-1] for row in rows} == {"ok"}


def test_every_method_of_the_recipe_is_recorded():
    from longwave.evals.recipe import make_recipe

    recipe = make_recipe(gate.HERE / "gate.yaml", out="unused")
    assert set(RECORDED) == set(recipe.tasks)
    assert all(set(methods) == set(recipe.methods) for methods in RECORDED.values())


@pytest.mark.parametrize("task", RECORDED)
@pytest.mark.parametrize("what", ["value", "ratio"])
@pytest.mark.parametrize("direction", [-1, 1])
def test_a_number_that_moves_is_outside(task, what, direction):
    for method in RECORDED[task]:
        found = copy.deepcopy(RECORDED)
        step = 34 if "needle" in task else max(0.02, 0.2 * found[task][method][what])
        found[task][method][what] += direction * (step if what == "value" else 0.02)
        rows, well = gate.check(RECORDED, found)
        assert not well
        assert [row[:3] for row in rows if row[-1] == "OUTSIDE"] == [[task, method, what]]


def test_a_missing_method_is_not_passed_over():
    found = copy.deepcopy(RECORDED)
    task = next(iter(found))
    del found[task]["fourier-paper"]
    rows, well = gate.check(RECORDED, found)
    assert not well
    assert [row[1] for row in rows if row[-1] == "MISSING"] == ["fourier-paper"] * 2


def test_the_command_fails(monkeypatch):
    found = copy.deepcopy(RECORDED)
    next(iter(found.values()))["fourier:budget=0.08"]["value"] *= 1.5
    monkeypatch.setattr(gate, "measure", lambda recipe: found)
    monkeypatch.setattr("sys.argv", ["gate"])
    with pytest.raises(SystemExit, match="left its band"):
        gate.main()


def test_what_was_never_recorded_is_not_passed_over():
    found = copy.deepcopy(RECORDED)
    found["new task"] = {"dense": {"value": 1.0, "ratio": 1.0}}
    rows, well = gate.check(RECORDED, found)
    assert not well
    assert [row[0] for row in rows if row[-1] == "NOT RECORDED"] == ["new task"]
