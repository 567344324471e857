"""`python -m tests.models`: every check on every row, then docs/models.md. An error ends it, and nothing is written."""

from tests.models.checks import refused, works
from tests.models.page import PAGE, written
from tests.models.table import ROWS

for row in ROWS:
    if row.refused:
        found = refused(row)
        assert found == row.refused, f"{row}: {found}"
    else:
        works(row)
    print(f"{row}: {'refused' if row.refused else 'works'}", flush=True)
PAGE.write_text(written())
