"""The inks of pictures can be told apart on white paper, in grey, and by readers who see fewer colours."""

from itertools import combinations

import numpy as np
import pytest

from longwave.evals import style
from longwave.evals.plots import contrast

# linear red, green, blue as they are seen without one kind of cone (Machado, Oliveira, Fernandes 2009, severity 1)
SEEN = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def rgb(ink):
    return np.array([int(ink[i : i + 2], 16) for i in (1, 3, 5)])


def lab(ink, seen):
    """CIELAB of an ink, under D65."""
    share = rgb(ink) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.array(seen) @ linear, 0, 1) / XYZ.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_inks_are_apart(seen):
    for one, other in combinations(style.INKS, 2):
        assert np.linalg.norm(lab(one, seen) - lab(other, seen)) > 25  # 2 can just be told beside each other


def test_inks_differ_in_lightness_and_stand_out_from_white():
    lightness = sorted(lab(ink, SEEN["all cones"])[0] for ink in style.INKS)
    assert min(np.diff(lightness)) > 6
    for ink in style.INKS:
        assert contrast(rgb(ink), (255, 255, 255)) > 2.8


def test_lines_differ_in_mark_and_ink():
    looks = [style.line(number) for number in range(len(style.INKS))]
    assert len({look["marker"] for look in looks}) == len({look["color"] for look in looks}) == len(looks)
    assert style.line(0, dash=1)["linestyle"] != style.line(0)["linestyle"]


def test_a_picture_is_the_same_every_time(tmp_path):
    for name in ("a.svg", "b.svg", "c.png"):
        with style.paper():
            figure = style.blank(1.0, width=1.5)
            figure.add_subplot().plot([1, 2], [2, 1], **style.line(2, dash=2))
            style.save(figure, tmp_path / "deep" / name)
    assert (tmp_path / "deep/a.svg").read_bytes() == (tmp_path / "deep/b.svg").read_bytes()
    assert (tmp_path / "deep/c.png").read_bytes()[:4] == b"\x89PNG"
