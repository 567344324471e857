"""Variants without a GPU: constants are set, put back, and one that fails stops no other."""

import pytest

pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
from benchmarks import kernels, variants


@pytest.fixture
def seen(monkeypatch):
    found = []

    def once(steps, capture=True):
        found.append(variants.kernel.LEAST)
        if found[-1] == 7:
            raise RuntimeError("no such luck")
        return 2.0

    monkeypatch.setattr(kernels, "timed", once)
    monkeypatch.setattr(kernels, "COPIES", 1)
    monkeypatch.setattr(kernels, "NEAR", 2e-2)  # the interpreter cuts bits off
    return found


def test_constants_are_set_and_put_back(seen, capsys):
    usual = variants.kernel.LEAST
    variants.main(["a", "1x600", "{}", '{"LEAST": 7}', '{"LEAST": 2}'])
    assert seen == [usual, 7, 2]
    assert usual == variants.kernel.LEAST
    said = capsys.readouterr().out
    assert 'a0 1x600 {"LEAST": 7}: RuntimeError: no such luck' in said
    assert 'mean 1x600 {"LEAST": 2}: 2.0 us of 1 layers' in said


def test_an_unknown_constant_is_refused(capsys):
    with pytest.raises(SystemExit):
        variants.main(["a", "1x600", '{"LAST": 2}'])
    assert "has no LAST" in capsys.readouterr().err
