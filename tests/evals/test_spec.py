import pytest

from longwave.evals.spec import as_spec, dense_of, is_dense, parse_spec, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.25", 0.25),
        ("-3", -3),
        ("(0.1, 0.4)", (0.1, 0.4)),
        ("None", None),
        ("True", True),
        ("'dct'", "dct"),
        ("dct", "dct"),
        ("25%", "25%"),
        ("1-2", "1-2"),
        ("007", "007"),
        ("/tmp/a.txt", "/tmp/a.txt"),
        ("{[]: 1}", "{[]: 1}"),
        ("", ""),
    ],
)
def test_values_are_literals_or_text(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("dense", "dense", {}),
        (" dense ", "dense", {}),
        ("fourier:budget=0.25,window=64", "fourier", {"budget": 0.25, "window": 64}),
        ("fourier:budget=25%,keep=(0.1,0.4),states=4", "fourier", {"budget": "25%", "keep": (0.1, 0.4), "states": 4}),
        (
            "needle:lengths=180,200,depths=0.1,0.9",
            "needle",
            {"lengths": (180, 200), "depths": (0.1, 0.9)},
        ),
        ("needle:lengths=180, 200, depths=0.1, 0.9", "needle", {"lengths": (180, 200), "depths": (0.1, 0.9)}),
        ("needle: lengths = 180 , depths = 1", "needle", {"lengths": 180, "depths": 1}),
        ("needle:lengths=180,", "needle", {"lengths": (180,)}),
        ("longbench:sets=qasper,trec,limit=3", "longbench", {"sets": ("qasper", "trec"), "limit": 3}),
        ("x:mixed=1k,2,c", "x", {"mixed": ("1k", 2, "c")}),
        ("x:path=/a/b=c.txt,n=1", "x", {"path": "/a/b=c.txt", "n": 1}),
        ("x:path='/a/b,c.txt',n=1", "x", {"path": "/a/b,c.txt", "n": 1}),
        ("x:path=C:/a.txt", "x", {"path": "C:/a.txt"}),
        ("x:text=", "x", {"text": ""}),
    ],
)
def test_specs(text, name, options):
    assert parse_spec(text) == (name, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'NAME:option=value,option=value; got ""'),
        ("  ", "NAME:option=value"),
        ("needle:", 'got "needle:"'),
        (":lengths=1", 'got ":lengths=1"'),
        ("needle:lengths", 'an option is NAME=VALUE, got "lengths" in "needle:lengths"'),
        ("needle:=5", 'got "=5"'),
        ("needle:1=5", 'got "1=5"'),
        ("needle:,lengths=5", 'got ""'),
        ("needle:lengths=1,lengths=2", "option 'lengths' is given twice"),
        ("needle:lengths=1, lengths=2", "option 'lengths' is given twice"),
    ],
)
def test_bad_specs(text, message):
    with pytest.raises(ValueError) as error:
        parse_spec(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("item", "spec"),
    [
        ("fourier:budget=0.25", "fourier:budget=0.25"),
        (" dense ", "dense"),
        ({"name": "dense"}, "dense"),
        ({"name": "fourier", "budget": 0.25, "window": 64}, "fourier:budget=0.25,window=64"),
        ({"budget": "1MB", "name": "fourier"}, "fourier:budget=1MB"),
        ({"name": "needle", "lengths": [180, 200], "depths": [0.1, 0.9]}, "needle:lengths=180,200,depths=0.1,0.9"),
        ({"name": "fourier", "segment": None, "exact": True}, "fourier:segment=None,exact=True"),
    ],
)
def test_recipe_entries(item, spec):
    assert as_spec(item) == spec


def test_a_mapping_means_what_its_text_means():
    item = {"name": "x", "a": [1, 2], "b": 0.5, "c": None, "d": "dct", "e": [0.5], "f": False}
    name, options = parse_spec(as_spec(item))
    assert name == "x"
    assert options == {"a": (1, 2), "b": 0.5, "c": None, "d": "dct", "e": 0.5, "f": False}


@pytest.mark.parametrize("item", [5, None, ["dense"], {"needle": {"lengths": [1]}}, {"name": 3}, {}])
def test_bad_recipe_entries(item):
    with pytest.raises(ValueError, match="a text or a mapping with a name"):
        as_spec(item)


def test_what_a_method_is_held_against():
    """Dense; of a masked-diffusion model the one that holds nothing and samples alike."""
    few, many = "dense:steps=8,block_length=32", "dense:steps=64,block_length=32"
    labels = [
        few,
        many,
        "dense:steps=8,block_length=32,keep=dual",
        "kivi:budget=0.3,steps=64,block_length=32,keep=dual",
    ]
    assert [is_dense(label) for label in labels] == [True, True, False, False]
    assert [dense_of(label, labels) for label in labels] == [None, None, few, many]
    assert dense_of("kivi:steps=3", labels) is None
    assert dense_of("kivi:budget=0.3", ["kivi:budget=0.3", "dense"]) == "dense"
    assert dense_of("dense", ["dense"]) is None
    assert not is_dense("dense_like:keep=1")
    assert dense_of("damaged:", ["dense"]) == "dense"
