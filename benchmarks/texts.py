"""Windows of real text for the benchmarks. What a fresh machine has, or ../shared/data where it is mounted."""

import os
from pathlib import Path

from longwave.evals.needle import pydoc_haystack

DATA = Path(os.environ.get("LONGWAVE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def calibration_texts() -> dict[str, str]:
    """Text to measure profiles on; nothing of it is in `test_texts`."""
    texts = {"pydoc_data.topics": pydoc_haystack()}
    for path in sorted((DATA / "books" / "calibration").glob("*.txt"))[:3]:
        texts[path.name] = path.read_text()
    return texts


def test_texts() -> dict[str, str]:
    """Unseen text: a government report, PG-19 test books, Python code. Raises where the data is not mounted."""
    paths = [DATA / "gov_report" / "gov_report_001.txt", DATA / "code" / "lm_eval_api_models.py.txt"]
    paths += sorted((DATA / "books" / "test_pg19").glob("*.txt"))
    missing = [path for path in paths if not path.exists()]
    if missing or len(paths) < 3:
        raise SystemExit(f"evaluation data not found under {DATA}; set LONGWAVE_DATA to its folder")
    return {path.name: path.read_text() for path in paths}
