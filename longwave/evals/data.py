"""Finding evaluation data and reading its files, with errors that name the file, the line and what to do."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longwave.checks import parse_json, read_text, whole
from longwave.evals.download import command_for
from longwave.fetch import cache_folder

FORMATS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


def data_folder(given: Path | None = None) -> Path | None:
    """Where evaluation data lies: `given` (--data), else $LONGWAVE_DATA, else shared/data beside the checkout, else
    where `longwave eval data` puts it."""
    if given is not None:
        if not given.is_dir():
            raise ValueError(f"there is no data folder {given}")
        return given
    if named := os.environ.get("LONGWAVE_DATA"):
        if not Path(named).is_dir():
            raise ValueError(f"there is no data folder {named}, which LONGWAVE_DATA names")
        return Path(named)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return next((folder for folder in (beside, fetched_folder()) if folder.is_dir()), None)


def fetched_folder() -> Path:
    """Where `longwave eval data` puts it."""
    return Path(os.environ.get("LONGWAVE_DATA") or cache_folder() / "data")


def require(folder: Path | None, relative: str, what: str) -> Path:
    """The path `relative` in the data folder, or an error that says what is missing and how to give it."""
    command = command_for(relative)
    fetches = f"`{command}` fetches it. Or " if command else ""
    if folder is None:
        raise ValueError(
            f"{what} needs a data folder with {relative}: {fetches}give --data FOLDER or set LONGWAVE_DATA"
        )
    path = folder / relative
    if not path.exists():
        raise ValueError(
            f"{what} needs {path}, which does not exist: {fetches}is --data (or LONGWAVE_DATA) the right folder?"
        )
    return path


def find_records(folder: Path, stem: str) -> Path | None:
    """The file `stem` in `folder` in any format we read, or None."""
    return next((folder / (stem + ending) for ending in FORMATS if (folder / (stem + ending)).is_file()), None)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a JSON lines, JSON or Parquet file, gzip or not. A broken line is named by its number."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix == ".parquet":
        import pyarrow.parquet
        from pyarrow import ArrowException

        try:
            return list(pyarrow.parquet.read_table(path).to_pylist())
        except ArrowException as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
    name = path.name.removesuffix(".gz")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    if name.endswith(".json"):
        records = parse_json(text, path)
        if not isinstance(records, list) or not all(isinstance(item, dict) for item in records):
            raise ValueError(f"{path} is not a list of records")
        return records
    return list(json_lines(path, text))


def json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """The records of JSON lines; `path` is named in errors."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: records may hold other line separators
        if not line.strip():
            continue
        record = parse_json(line, path, number)
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} is not a record but {type(record).__name__}")
        yield record


def field(record: Any, name: str, where: object) -> Any:
    """A field that a record must have."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} has no field {name!r}: it is {record!r}"[:200])
    if name not in record:
        raise ValueError(f"{where} has no field {name!r}; it has {', '.join(map(str, record)) or 'none'}")
    return record[name]


def text_field(record: Any, name: str, where: object) -> str:
    """A field that must be a text."""
    value = field(record, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where} has {name} {value!r}, which is not a text")
    return value


def list_field(record: Any, name: str, where: object) -> list[str]:
    """A field that must be a list of something, as texts."""
    value = field(record, name, where)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} has {name} {value!r}, which is not a list of texts")
    return [str(item) for item in value]


def count_field(record: Any, name: str, where: object) -> int:
    """A field that must be a number of tokens or the like."""
    return whole(f"{name} in {where}", field(record, name, where), 1)


def halves(template: str, place: str, where: object) -> tuple[str, str]:
    """What a template says before and after the one place of its long text."""
    if template.count(place) != 1:
        raise ValueError(f"{where} has {template.count(place)} places for {place}, not one: {template[:60]!r}")
    before, _, after = template.partition(place)
    return before, after


def fill(template: str, where: object, **values: Any) -> str:
    """A template with its places filled."""
    try:
        return template.format(**values)
    except (LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"{where} has a place that nothing fills ({error}): {template[:60]!r}") from None


def haystack(name: str, folder: Path | None) -> str:
    """Long prose to hide things in: "essays" (public domain, of the data folder), "pydoc", or a path."""
    if name == "pydoc":
        return pydoc_haystack()
    if name == "essays":
        essays = require(folder, "haystack_pd", 'haystack "essays" (or take haystack=pydoc, which Python carries)')
        return "\n\n".join(read_text(path) for path in sorted(essays.glob("*.txt")))
    path = Path(str(name))
    if not path.is_file():
        raise ValueError(f'haystack is "essays", "pydoc" or a file; there is no file {name!r}')
    return read_text(path)


def pydoc_haystack() -> str:
    """English prose that every Python carries: the help topics of the language, about 465,000 characters."""
    import pydoc_data.topics

    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def texts(name: str, folder: Path | None) -> dict[str, str]:
    """Text to score, by file name: "pg19" (test split), "wikitext2", "mixed", "pydoc", a file or a folder.

    "mixed" is a government report, Python code and the PG-19 test books. All but "pydoc" come from the data folder, and
    nothing was calibrated on them; the profile that ships for smollm2 was measured on "pydoc" among others.
    """
    if name == "pydoc":
        return {"pydoc": pydoc_haystack()}
    known = {
        "pg19": ["books/test_pg19"],
        "wikitext2": ["wikitext2/wiki.test.raw"],
        "mixed": ["gov_report/gov_report_001.txt", "code/lm_eval_api_models.py.txt", "books/test_pg19"],
    }
    if name in known:
        paths = [
            require(folder, part, f'text "{name}" (or take text=pydoc, which Python carries)') for part in known[name]
        ]
    elif (path := Path(str(name))).exists():
        paths = [path]
    else:
        raise ValueError(f"text is one of {', '.join([*known, 'pydoc'])}, a file or a folder; there is no {name!r}")
    files = [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"there are no .txt files in {name}")
    return {file.name: read_text(file) for file in files}
