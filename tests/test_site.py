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


def test_links_to_sources_become_their_paths():
    assert on_page_markdown("[blocks](../longwave/a.py#L3)") == "blocks (`longwave/a.py#L3`)"
    assert on_page_markdown("[longwave/a.py](../longwave/a.py)") == "longwave/a.py"
    assert on_page_markdown("[samples](results/carry)") == "samples (`docs/results/carry`)"
    for stays in ("[results](results.md)", "[a report](results/smollm2/report.md)", "![loss](results/loss.png)"):
        assert on_page_markdown(stays) == stays


def test_links_of_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not target.startswith("$"):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
