"""Real text to calibrate on: what a fresh machine has, and ../shared/data where it is mounted."""

import argparse
import inspect
import statistics
import tarfile

from longwave.evals.data import data_folder, pydoc_haystack


def calibration_texts() -> dict[str, str]:
    """Text to measure profiles on; the evaluation reads none of it: help topics, Python's own code, and novels."""
    texts = {
        "pydoc_data.topics": pydoc_haystack(),
        "library code": "\n\n".join(inspect.getsource(module) for module in (argparse, tarfile, statistics)),
    }
    folder = data_folder()
    for path in sorted((folder / "books" / "calibration").glob("*.txt"))[:3] if folder else []:
        texts[path.name] = path.read_text()
    return texts
