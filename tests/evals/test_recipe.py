from pathlib import Path

import pytest

from longwave.evals.recipe import Recipe, make_recipe, read_recipe
from tests.evals.recipes import recipe


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
        return path

    return write


def test_a_recipe_says_what_flags_say(file):
    path = file(
        """
        model: some/model
        out: results
        methods:
          - dense
          - {name: fourier, budget: 0.25, window: 64}
        tasks:
          - name: needle
            lengths: [180, 200]
            depths: [0.1, 0.9]
          - perplexity:text=pydoc
        limit: 3
        seed: 7
        max_tokens: 400
        question: with
        chat: false
        data: some/data
        device: cuda
        dtype: bfloat16
        batch: 2
        batch_tokens: 1000
        profile: my.json
        extend_to: 9000
        window: 20000
        extend_rule: yarn
        """
    )
    flags = dict(
        model="some/model",
        out=Path("results"),
        methods=["dense", "fourier:budget=0.25,window=64"],
        tasks=["needle:lengths=180,200,depths=0.1,0.9", "perplexity:text=pydoc"],
        **dict(limit=3, seed=7, max_tokens=400, question="with", chat=False, data=Path("some/data"), device="cuda"),
        **dict(
            dtype="bfloat16",
            batch=2,
            batch_tokens=1000,
            profile=Path("my.json"),
            extend_to=9000,
            extend_rule="yarn",
            window=20000,
        ),
    )
    assert make_recipe(path) == make_recipe(None, **flags)
    assert set(flags) == set(Recipe.__dataclass_fields__), "an option was added: name it in both"
    for name, value in flags.items():
        assert getattr(make_recipe(path), name) == (tuple(value) if isinstance(value, list) else value)


def test_flags_win_over_a_recipe(file):
    path = file("out: results\nmethods: [dense, fourier]\ntasks: needle\nlimit: 3\nchat: false\nseed: 1\n")
    given = make_recipe(path, out=Path("mine"), methods=["dense"], tasks=None, limit=5, chat=True, seed=None)
    assert given == recipe(out="mine", limit=5, chat=True, seed=1)
    assert make_recipe(path, limit=None).limit == 3


def test_one_entry_needs_no_list(file):
    one = make_recipe(file("out: x\nmethods: dense\ntasks: {name: needle, lengths: 180}\n"))
    assert (one.methods, one.tasks) == (("dense",), ("needle:lengths=180",))


def test_null_in_a_recipe_is_the_default(file):
    path = file("out: null\nmethods: [dense]\ntasks: [needle]\nlimit:\nseed: null\n")
    assert make_recipe(path, out=Path("out")) == recipe()
    with pytest.raises(ValueError, match="name a folder for the results: --out DIR"):
        make_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [dense]", "has no key 'method' to set; did you mean 'methods'?"),
        ("task: needle", "did you mean 'tasks'?"),
        ("lmit: 3", "did you mean 'limit'?"),
        ("zzz: 3", "choose from out, methods, tasks, model"),
        ("5: 3", "has no key 5"),
        ("methods: [dense", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("\x07", "is not YAML"),
        ("- dense\n", "is not a recipe: it has to be a mapping"),
        ("", "is not a recipe"),
        ("dense", "is not a recipe"),
        (b"model: caf\xe9", "is not UTF-8 text"),
    ],
)
def test_bad_recipes(file, text, message):
    with pytest.raises(ValueError) as error:
        read_recipe(file(text))
    assert "recipe.yaml" in str(error.value)
    assert message in str(error.value)


def test_missing_recipe(tmp_path):
    with pytest.raises(OSError, match=r"absent\.yaml"):
        read_recipe(tmp_path / "absent.yaml")
    with pytest.raises(OSError):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "there are no methods to measure: give at least one --method"),
        ({"methods": None}, "there are no methods"),
        ({"tasks": ()}, "there are no tasks to measure: give at least one --task"),
        ({"methods": 5}, "methods is a list, got 5"),
        ({"tasks": True}, "tasks is a list, got True"),
        ({"methods": ["dense", None]}, "a text or a mapping with a name, got None"),
        ({"methods": ["dense", "fourier", "dense"]}, "dense is given twice"),
        ({"methods": ["dense", " dense"]}, "dense is given twice"),
        ({"tasks": ["needle:lengths=180", {"name": "needle", "lengths": 180}]}, "needle:lengths=180 is given twice"),
        ({"limit": 0}, "limit is a whole number, at least 1; got 0"),
        ({"limit": 2.5}, "limit is a whole number, at least 1; got 2.5"),
        ({"limit": True}, "limit is a whole number, at least 1; got True"),
        ({"limit": "3"}, "limit is a whole number, at least 1; got '3'"),
        ({"max_tokens": -1}, "max_tokens is a whole number, at least 1; got -1"),
        ({"batch": 0}, "batch is a whole number, at least 1; got 0"),
        ({"batch_tokens": 0}, "batch_tokens is a whole number, at least 1; got 0"),
        ({"batch": None}, "batch is a whole number, at least 1; got None"),
        ({"seed": "x"}, "seed is a whole number; got 'x'"),
        ({"question": "sideways"}, "question is one of after, inside, with; got 'sideways'"),
        ({"question": None}, "question is one of after, inside, with; got None"),
        ({"out": 5}, "out is a path, got 5"),
        ({"data": ["a"]}, "data is a path, got ['a']"),
        ({"profile": 0}, "profile is a path, got 0"),
        ({"model": 3}, "model is a text, got 3"),
        ({"device": None}, "device is a text, got None"),
        ({"dtype": ["float32"]}, "dtype is a text, got ['float32']"),
        ({"chat": "no"}, "chat is true or false, got 'no'"),
    ],
    ids=repr,
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError) as error:
        recipe(**changes)
    assert message in str(error.value)


def test_a_negative_seed_is_a_seed():
    assert recipe(seed=-1).seed == -1
