import pytest

from tests.evals import made_up
from tests.evals.reports import FOURIER, Page, grid, report

pytestmark = pytest.mark.usefixtures("made_up_tasks")


def test_speed_and_bytes(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid(count=2), methods=("dense", FOURIER)))
    assert ["dense", "0.500", "2", "1.00", "2.00", "450", "8.0"] in Page(html).rows
    assert "not a benchmark" in html
    assert "not a benchmark" in markdown
