"""The site of docs/: `make site` builds it, and fails for a link that leads nowhere."""

import re
from pathlib import Path

import yaml

from tools.site import on_page_markdown

ROOT = Path(__file__).resolve().parents[1]


def pages(nav):
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages(value)


def test_the_navigation_names_every_page_once():
    found = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(found) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))


def test_all_rows_have_a_question_a_command_and_a_commit():
    results = ROOT / "docs" / "results"
    table = [line for line in (results / "rows.md").read_text().splitlines() if line.startswith("| ")][1:]
    for line in table:
        question, rows, command, commit, told = (cell.strip() for cell in line.strip("|").split(" | "))
        assert question, line
        assert rows, line
        assert "`" in command or "script" in command or "in its report" in command or command.startswith("the same"), (
            line
        )
        assert re.search(r"\b[0-9a-f]{7}\b", commit), line
        assert "](../" in told, line
    cells = [line.split(" | ")[1] for line in table]
    folders = tuple(f"{name}/" for cell in cells for name in re.findall(r"\]\((\w+)/", cell))  # a report's
    named = {name for cell in cells if "](" not in cell for name in cell.split(", ")}
    found = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    assert {name for name in found if name in named or not name.startswith(("rows.md", *folders))} == named


def test_links_to_sources_become_their_paths():
    assert on_page_markdown("[blocks](../longwave/a.py#L3)") == "blocks (`longwave/a.py#L3`)"
    assert on_page_markdown("[longwave/a.py](../longwave/a.py)") == "longwave/a.py"
    assert on_page_markdown("[samples](results/carry)") == "samples (`docs/results/carry`)"
    for stays in ("[results](results.md)", "[a report](results/family/report.md)", "![loss](results/loss.png)"):
        assert on_page_markdown(stays) == stays


def test_links_of_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not target.startswith("$"):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
