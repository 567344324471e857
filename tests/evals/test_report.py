"""The report as a whole; `test_report_browser.py` looks at the page, `sections/` at its numbers and marks."""

import json
import re

import pytest

from longwave.evals.report import write_report
from tests.evals import made_up
from tests.evals.made_up import HOSTILE
from tests.evals.reports import FOURIER, Page, grid, grid_row, report, tables

pytestmark = pytest.mark.usefixtures("made_up_tasks")


def test_same_rows_give_the_same_files(tmp_path):
    first = report(made_up.everything(tmp_path / "a"))
    again = report(made_up.everything(tmp_path / "a"))
    assert first == again


def test_several_folders(tmp_path):
    first = made_up.write(tmp_path / "a", grid(methods=("dense",)), methods=("dense",))
    rows = [{**row, "score": 0.0, "method": FOURIER} for row in grid(methods=("dense",))]
    second = made_up.write(tmp_path / "b", rows, methods=(FOURIER,))
    html, markdown = report(first, second)
    assert [row[2] for row in Page(html).rows[1:3]] == ["100.0 / reference", "0.0 / −100.0 ✗ worse"]
    for text in (html, markdown):
        assert "--out a" in text
        assert "--out b" in text
    assert not (second / "report.html").exists()


def test_folders_of_other_models_are_refused(tmp_path):
    first = made_up.write(tmp_path / "a", grid())
    second = made_up.write(tmp_path / "b", grid(), model="another")
    with pytest.raises(ValueError, match="another"):
        write_report([first, second], tmp_path)


def test_folders_without_results(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results: there is no run\.json"):
        write_report([tmp_path], tmp_path)
    with pytest.raises(ValueError, match="no results yet"):
        write_report([made_up.write(tmp_path / "a", [])], tmp_path)
    with pytest.raises(ValueError, match="none of 1 results has a score that is a finite number"):
        write_report([made_up.write(tmp_path / "b", [grid_row("dense", "a", None)])], tmp_path)
    with pytest.raises(ValueError, match="at least one folder"):
        write_report([], tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_file_is_not_overwritten_by_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        write_report([made_up.write(tmp_path / "a", grid())], tmp_path / "file")


def test_page_is_one_file_and_escaped(tmp_path):
    html, _ = report(made_up.everything(tmp_path))
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert HOSTILE not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("href", "src", "xlink:href")]
    assert links
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert not re.search(r"@import|url\((?!#)", html)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)


def test_markdown_tables_have_equal_rows_and_no_live_html(tmp_path):
    _, markdown = report(made_up.everything(tmp_path))
    found = tables(markdown)
    assert len(found) > 20
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}, table
        assert all(re.fullmatch("-{3}|--:", cell) for cell in table[1])
    prose = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in prose
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\|\`\*\_$x^2$" in prose


def test_everything_has_its_command(tmp_path):
    html, markdown = report(made_up.everything(tmp_path))
    assert html.count("<figure>") == html.count("<figcaption>") == html.count("<pre>")
    assert markdown.count("measured by") == markdown.count("```sh") == html.count("<figure>")


def test_settings_are_shown(tmp_path):
    folder = made_up.write(tmp_path, grid(), question="with", max_tokens=3500, chat=False)
    html, markdown = report(folder)
    for text in (html, markdown):
        assert "prompts cut to 3,500 tokens" in text
        assert "chat template not used" in text
        assert "Measured 2026-11-24 with longwave 0.1.0, torch 2.9.0" in text
        assert "(all of its options)" in text
    assert "one exact pass before anything is compressed" in markdown
    assert json.loads((folder / "run.json").read_text())["question"] == "with"


def test_the_lead_says_when_questions_are_seen(tmp_path):
    for question, says in (("after", "(query-agnostic)"), ("inside", "(query-aware)")):
        _, markdown = report(made_up.write(tmp_path / question, grid(), question=question))
        assert says in markdown.split("## ")[0]


def test_a_file_that_is_no_report_is_not_overwritten(tmp_path):
    folder = made_up.write(tmp_path / "run", grid())
    (folder / "report.md").write_text("my own notes")
    with pytest.raises(ValueError, match="not a report of longwave eval"):
        write_report([folder], folder)
    assert (folder / "report.md").read_text() == "my own notes"
    assert not (folder / "report.html").exists()
    (folder / "report.md").unlink()
    write_report([folder], folder)
    write_report([folder], folder)


def test_many_methods_stand_in_a_table_a_budget(tmp_path):
    """Without heat maps, dense leading each and then the best; what is asked inside stands apart."""
    methods = ["dense", *(f"m{i}:budget={budget}" for i in range(9) for budget in (0.25, 0.5)), "bare"]
    rows = [{**row, "score": 1.0} if row["method"] == "m7:budget=0.5" else row for row in grid(methods)]
    inside = [{**row, "task": "grid:question=inside"} for row in rows if row["method"] != "m8:budget=0.5"]
    made_up.write(tmp_path, [*rows, *inside], ("grid", "grid:question=inside"), methods)
    told = json.loads((tmp_path / "run.json").read_text())
    told["tasks"]["grid:question=inside"]["question"] = "inside"
    (tmp_path / "run.json").write_text(json.dumps(told))
    html, markdown = report(tmp_path)
    assert html.count('<svg class="chart"') == 2
    assert "depth ↓" not in html
    assert "17 others" not in html
    assert "others</span>" in html
    heads = ("Best for their bytes</h2>", "Quality against bytes</h2>", "Summary</h2>")
    assert sorted(heads, key=html.index) == list(heads)
    first = tables(markdown.split("## Best for their bytes")[1])[0]
    assert [row[0] for row in first] == ["method", "---", "dense", "m7:budget=0.5"]
    assert "Otherwise where a task says so: grid:question=inside." in html
    summary = markdown.split("### query-agnostic")[1].split("## grid")[0]
    assert summary.count("budget 0.5\n") == summary.count("budget 0.25\n") == summary.count("no budget\n") == 2
    assert summary.index("budget 0.5\n") < summary.index("budget 0.25\n") < summary.index("### query-aware")
    assert "grid:question=inside; score, 0 to 100" in summary.split("### query-aware")[1]
    found = tables(markdown.split("### query-agnostic")[1])[0]
    assert [row[0] for row in found[:3]] == ["method", "---", "dense"]
    assert [row[0] for row in found[3:]] == [f"m{i}:budget=0.5" for i in (7, 0, 1, 2, 3, 4, 5, 6, 8)]
    assert [row[2] for row in found[3:5]] == ["**100.0**; 0.0", "50.0; −50.0 ✗"]
