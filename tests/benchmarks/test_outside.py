"""What is compared with kvpress, and what is said where it is not installed."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import outside
from longwave.methods import get_method


@pytest.mark.parametrize(("python", "why"), [("/nowhere/python", "there is no such file"), (sys.executable, "kvpress")])
def test_without_kvpress_the_way_to_install_it_is_said(tmp_path, python, why):
    job = {"presses": [["snapkv", 0.75]]}
    with pytest.raises(SystemExit, match=rf"cannot import kvpress \(.*{why}.*\).*\n.*pip install .* kvpress=="):
        outside.theirs(Path(python), tmp_path, job)


def test_scores_are_scaled_and_ends_left_out():
    method = get_method("snapkv", tokens=375)
    a = torch.rand(2, 3, outside.CONTEXT)
    b = 5 * a
    a[..., -64:], b[..., -64:], b[..., :4] = 7, 9, 0
    assert outside.apart(a, b, method) < 1e-6
    b[0, 0, 100] = 0
    assert outside.apart(a, b, method) == pytest.approx(float(a[0, 0, 100] / a[0, 0, 4:-64].max()), rel=1e-4)


@pytest.mark.parametrize("name", outside.OURS)
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_settings_can_be_built(name, ratio):
    for options in outside.OURS[name]:
        outside.build(name, options, ratio, (1, 2))
