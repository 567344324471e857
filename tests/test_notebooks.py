"""The notebooks: each parses, holds no output and imports what there is; slowly, each runs from first cell to last."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

import longwave

ROOT = Path(longwave.__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def code_of(notebook):
    """Its code cells: (cell, source)."""
    cells = json.loads(notebook.read_text())["cells"]
    return [(cell, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def imported(source):
    """(module, name or None) of everything that a cell imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["compare_methods", "long_document", "own_method"]


def test_cells_are_small_stored_without_outputs_and_import_what_is_there(notebook):
    cells = code_of(notebook)
    assert cells
    for cell, source in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        for module, name in imported(source):
            assert importlib.util.find_spec(module), f"{notebook.name} imports {module}"
            if name is not None and module.startswith("longwave"):
                assert hasattr(importlib.import_module(module), name), f"{notebook.name} imports {name} from {module}"
    assert notebook.stat().st_size < 16_000


def test_readme_and_the_site_lead_there(notebook):
    for page in ("README.md", "docs/first-hour.md", "docs/index.md"):
        assert f"notebooks/{notebook.name})" in (ROOT / page).read_text(), page


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = nbformat.read(notebook, as_version=4)
    nbformat.validate(made)
    NotebookClient(made, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(out.get("text", "") for cell in made.cells for out in cell.get("outputs", ()))
    for words in SAID[notebook.stem]:
        assert words in said


SAID = {
    "long_document": ("John Field", "tokens in a file of", "infllm(reads window=512"),
    "compare_methods": ("fourier:budget=0.25", "streaming:budget=0.25"),
    "own_method": ("vatp(0.", "vatp:budget=0.25"),
}
