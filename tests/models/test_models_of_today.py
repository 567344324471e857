"""Every row of the table, and the page that shows it."""

import pytest

from tests.models.checks import refused, works
from tests.models.page import PAGE, written
from tests.models.table import ROWS


@pytest.mark.parametrize("row", [row for row in ROWS if not row.refused], ids=str)
def test_works(row):
    works(row)


@pytest.mark.parametrize("row", [row for row in ROWS if row.refused], ids=str)
def test_is_refused_for_what_is_so_and_left_alone(row):
    assert refused(row) == row.refused


def test_the_page_is_of_today():
    """`python -m tests.models` writes it."""
    assert PAGE.read_text() == written()
    assert all(row.name in PAGE.read_text() for row in ROWS)
