import pytest

import longwave
from longwave.evals.caches import in_words, make_methods
from longwave.evals.spec import parse_spec
from tests.conftest import random_profile
from tests.evals.recipes import SMALL, recipe


def test_methods_are_built_before_anything_is_measured(llama):
    makers, words, rows = make_methods(llama, recipe(methods=["dense", f"fourier:budget=1,{SMALL}"]))
    assert rows == 8
    assert list(makers) == list(words) == ["dense", f"fourier:budget=1,{SMALL}"]
    assert [make(3).method.method.name for make in makers.values()] == ["dense", "fourier"]
    assert makers["dense"](1) is not makers["dense"](1)


@pytest.mark.parametrize(("budget", "rows"), [("1MB", 1), ("100KB", 1), ("1", 8), ("100%", 8), ("None", 8)])
def test_a_size_makes_batches_of_one_row(llama, tmp_path, budget, rows):
    random_profile(llama).save(tmp_path / "p.json")
    wanted = recipe(methods=["dense", f"fourier:budget={budget},{SMALL}"], profile=tmp_path / "p.json")
    assert make_methods(llama, wanted)[2] == rows


@pytest.mark.parametrize("method", ["fourier:budget=0.5,segment=16,window=16", "fourier-paper"])
def test_words_tell_what_is_kept(llama, method):
    def words(seed):
        name, options = parse_spec(method)
        return in_words(longwave.cache(llama, name, profile=random_profile(llama, seed), **options).method)

    assert words(0) == words(0) != words(1)


def test_words_of_other_methods(llama):
    assert in_words(longwave.cache(llama, "dense").method) == "dense"
    assert in_words(longwave.cache(llama, "kivi", bits=4).method).startswith("kivi(K 4 V 4 bits")
