"""The way of docs/first-hour.md with a text of 100 pages, in memory that a laptop has."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import longwave

ROOT = Path(longwave.__file__).parents[1]
MEASURED = "\nimport resource; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # KiB on Linux


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_a_hundred_pages_are_read_in_less_than_8_gib(smollm2, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "first-hour.md").read_text(), re.S | re.M)
    (tmp_path / "book.txt").write_text(longwave.sample() * 13)  # 182,000 characters, 1,800 a page
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code + MEASURED],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "warning" not in done.stderr.lower()
    assert int(re.search(r"(\d+) tokens x 1 rows", done.stdout.replace(",", ""))[1]) > 40_000
    assert int(re.search(r"peak (\d+)", done.stdout)[1]) < 8 * 2**20
