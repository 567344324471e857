import pytest

from tests.evals import made_up
from tests.evals.reports import FOURIER, Page, grid, grid_row, report, tables

pytestmark = pytest.mark.usefixtures("made_up_tasks")


def test_summary_numbers(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid()))
    rows = Page(html).rows
    assert rows[0] == ["method", "bytes ratio / whole cache", "grid / score, 0 to 100"]
    assert rows[1] == ["dense", "0.500", "100.0 / reference"]
    assert rows[2] == [FOURIER, "0.500", "50.0 / −50.0 (−83.3 to −16.7) ✗ worse"]
    assert tables(markdown)[0][3][2] == "50.0; −50.0 (−83.3 to −16.7) ✗ worse"
    cell = next(attrs for tag, attrs in Page(html).tags if attrs.get("class") == "worse")
    assert cell  # a colour beside the sign


def test_a_method_without_any_sample_is_shown_as_missing(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid(methods=("dense",)), methods=("dense", FOURIER)))
    assert Page(html).rows[2] == [FOURIER, "– / not measured †", "– / not measured †"]
    assert "none of 6 samples" in html
    assert "none of 6 samples" in markdown


def test_one_method_and_no_dense(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid(methods=(FOURIER,)), methods=(FOURIER,)))
    assert Page(html).rows[1] == [FOURIER, "0.500", "100.0"]
    assert "Dense was not measured" in markdown
    assert "dashed line" not in html


def test_intervals_stand_only_where_there_are_samples_to_give_them(tmp_path):
    """Not of five samples, and not of six that are all alike, whose bootstrap would claim to be certain."""
    for count, alike, given in ((5, False, False), (6, True, False), (6, False, True)):
        rows = [grid_row(FOURIER, str(i), 1.0 if alike else i % 2) for i in range(count)]
        folder = made_up.write(tmp_path / f"{count}{alike}", rows, methods=(FOURIER,))
        for text in report(folder):
            assert ("95 %: " in text) is given
        numbers = next(row for row in Page(report(folder)[0]).rows if len(row) == 5 and row[0] == FOURIER)
        assert (numbers[3] != "–") is given
