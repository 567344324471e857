"""What the documents print as code runs as printed."""

import re
from pathlib import Path

import pytest

import longwave
from longwave.methods import METHODS
from tests.methods import page

DOCS = Path(__file__).resolve().parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


@pytest.fixture
def known():
    """Methods that a document registers are gone afterwards."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_the_method_in_design_md(known, capsys):
    (code,) = blocks("docs/design.md")
    method = code[: code.index("model, tokenizer")]
    assert len(code.strip().splitlines()) < 40
    space = {"__name__": "printed"}
    exec(compile(code, "docs/design.md", "exec"), space)
    assert "keydiff" in METHODS
    assert issubclass(METHODS["keydiff"], longwave.Evicting)
    report = space["cache"].report()
    assert report.tokens > report.held > 64
    assert report.ratio < 0.6
    assert str(report) in capsys.readouterr().out
    assert method.count("def ") == 1  # the score is all there is to it


def test_caches_go_by_the_name_of_today():
    """`past_key_values=` warns since transformers 5.24."""
    for path in [DOCS / "README.md", *(DOCS / "docs").rglob("*.md")]:
        assert not any("past_key_values=cache" in code for code in blocks(path)), path


def test_the_table_of_methods_leads_to_the_lines_of_a_method():
    for name, cls in METHODS.items():
        target, _, anchor = page.page_of(name, cls).partition("#")
        text = (page.PAGE.parent / target).read_text()
        assert not anchor or re.search(rf'<a id="{anchor}"></a>|^#+ {anchor}$', text, re.M), f"{target}#{anchor}"


def test_the_table_of_methods_is_what_the_code_says():
    assert page.ABOUT.keys() == METHODS.keys()
    text = page.PAGE.read_text()
    assert text[text.index(page.BEGIN) + len(page.BEGIN) : text.index(page.END)] == page.table(), (
        "python -m tests.methods.page writes it"
    )
