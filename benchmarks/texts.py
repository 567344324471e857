"""Real text to calibrate on: what a fresh machine has, and ../shared/data where it is mounted."""

from longwave.evals.data import data_folder, pydoc_haystack


def calibration_texts() -> dict[str, str]:
    """Text to measure profiles on; the evaluation reads none of the books."""
    texts = {"pydoc_data.topics": pydoc_haystack()}
    folder = data_folder()
    for path in sorted((folder / "books" / "calibration").glob("*.txt"))[:3] if folder else []:
        texts[path.name] = path.read_text()
    return texts
