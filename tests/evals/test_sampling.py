import pytest

from longwave.evals.sampling import Sampling, completed, read_sampling, split


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("dense", "dense:steps=64,block_length=32"),
        ("dense:keep=dual,steps=8", "dense:keep=dual,steps=8,block_length=32"),
        ("dense:threshold=0.9,block_length=4", "dense:threshold=0.9,block_length=4"),
        ("fourier:budget=0.25", "fourier:budget=0.25,steps=64,block_length=32,keep=prefix"),
        ("kivi", "kivi:steps=64,block_length=32,keep=prefix"),
        ("fourier-paper:keep=0.5", "fourier-paper:keep=0.5,steps=64,block_length=32"),
    ],
)
def test_labels_say_how_it_samples(spec, label):
    assert completed(spec) == completed(label) == label


def test_a_name_that_a_method_has_is_the_methods():
    assert split("fourier-paper:keep=0.5,states=20,steps=4") == (
        "fourier-paper",
        {"keep": 0.5, "states": 20},
        {"steps": 4},
    )
    assert read_sampling("fourier-paper:keep=0.5").keep == "prefix"
    assert split("kivi:budget=0.3,keep=dual,delay=1")[1:] == ({"budget": 0.3}, {"keep": "dual", "delay": 1})


@pytest.mark.parametrize(
    ("options", "new", "expected"),
    [
        ({}, 6, (6, 6, 6)),  # one block, a token a step
        ({}, 32, (32, 32, 32)),
        ({}, 50, (64, 32, 64)),
        ({}, 128, (128, 32, 64)),
        ({"steps": 5}, 96, (96, 32, 6)),  # shared evenly
        ({"steps": 1}, 64, (64, 32, 2)),
        ({"threshold": 0.9}, 50, (64, 32, None)),
    ],
)
def test_blocks_and_steps_of_an_answer(options, new, expected):
    assert Sampling(**options).lengths(new) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dense:steps=0", "steps is a whole number of steps of an answer, at least 1; got 0"),
        ("dense:steps=4,threshold=0.9", "give one"),
        ("dense:threshold=2", "above 0 and at most 1"),
        ("dense:threshold=high", "threshold is a confidence, got 'high'"),
        ("dense:block_length=many", "block_length is a whole number of tokens"),
        ("dense:keep=dull", "did you mean 'dual'"),
        ("dense:refresh=2", "refresh=2 decides nothing where nothing is held: give keep with it"),
        ("dense:delay=1", "delay=1 decides nothing"),
        ("kivi:refresh=0", "refresh is a whole number of passes, at least 1; got 0"),
    ],
)
def test_what_does_not_fit_is_named(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        read_sampling(spec)
    assert str(error.value).startswith(spec)
