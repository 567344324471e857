"""The committed pictures are what the committed rows give."""

import re
from importlib.metadata import version

import pytest

from benchmarks import plots

IMAGE = re.compile(r"!\[[^]]*\]\(([^)]+)\)")


@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_committed_picture_is_made_again(name, tmp_path):
    committed = (plots.RESULTS / name).read_text()
    drawn_by = re.search(r"Matplotlib v([\d.]+)", committed)[1]
    plots.PICTURES[name](tmp_path / "made.svg")
    made = (tmp_path / "made.svg").read_text()
    if version("matplotlib") == drawn_by:
        assert made == committed, "run `make plots`, and look at what changed"
    assert "<path" in made
    assert "DejaVuSans" in made


def test_every_picture_of_results_is_made_by_one_script(tmp_path, capsys):
    found = {str(p.relative_to(plots.RESULTS)) for kind in ("svg", "png") for p in plots.RESULTS.rglob(f"*.{kind}")}
    assert found == set(plots.PICTURES)
    docs = plots.RESULTS.parent
    pages = [docs.parent / "README.md", *docs.glob("*.md")]
    shown = [(page.parent / name).resolve() for page in pages for name in IMAGE.findall(page.read_text())]
    assert {plots.RESULTS / name for name in plots.PICTURES} <= set(shown)
    assert [path for path in shown if not path.is_file() and "http" not in str(path)] == []
