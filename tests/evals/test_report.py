"""The report's numbers, marks and escapes; `test_report_browser.py` looks at the page."""

import json
import re
from html.parser import HTMLParser
from statistics import mean

import pytest

from longwave.evals import plots, tasks
from longwave.evals.page import Done, escape_markdown, fence
from longwave.evals.report import by_budget, measured_by, write_report
from tests.evals import made_up
from tests.evals.made_up import HOSTILE, loss_row, text_row

FOURIER = "fourier:budget=0.25"


@pytest.fixture(autouse=True)
def made_up_tasks(monkeypatch):
    for name, task in made_up.TASKS.items():
        monkeypatch.setitem(tasks.TASKS, name, task)


def report(*folders):
    html, markdown = write_report(list(folders), folders[0])
    return html.read_text(), markdown.read_text()


def grid_row(method, sample, score, length=500, depth=0.5, **fields):
    return text_row("grid", method, sample, score, meta={"length": length, "depth": depth}, **fields)


def grid(methods=("dense", FOURIER), count=6, lost=()):
    """The first method answers all samples, the others the first half of them."""
    return [
        grid_row(method, str(i), float(method == methods[0] or i < count / 2), length=500 if i % 2 else 4000)
        for method in methods
        for i in range(count)
        if (method, i) not in lost
    ]


class Page(HTMLParser):
    """Tags, and the text of table cells row by row."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = True
        if tag == "small" and self.open:
            self.rows[-1][-1] += " / "

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data


def tables(markdown):
    """The tables of a Markdown text, as rows of cells."""
    found, last = [], False
    for line in markdown.splitlines():
        if line.startswith("|"):
            if not last:
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        last = line.startswith("|")
    return found


def test_summary_numbers(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid()))
    rows = Page(html).rows
    assert rows[0] == ["method", "bytes ratio / whole cache", "grid / score, 0 to 100"]
    assert rows[1] == ["dense", "0.500", "100.0 / reference"]
    assert rows[2] == [FOURIER, "0.500", "50.0 / −50.0 (−83.3 to −16.7) ✗ worse"]
    assert tables(markdown)[0][3][2] == "50.0; −50.0 (−83.3 to −16.7) ✗ worse"
    cell = next(attrs for tag, attrs in Page(html).tags if attrs.get("class") == "worse")
    assert cell  # a colour beside the sign


def test_same_rows_give_the_same_files(tmp_path):
    first = report(made_up.everything(tmp_path / "a"))
    again = report(made_up.everything(tmp_path / "a"))
    assert first == again


def test_sets_and_averages(tmp_path):
    scores = {"narrativeqa": (0.5, 0.5), "qasper": (0.25,), "gov_report": (1.0,), "odd": (0.0,)}
    rows = [
        text_row("sets", "dense", f"{name}/{i}", score, meta={"set": name})
        for name, some in scores.items()
        for i, score in enumerate(some)
    ]
    html, markdown = report(made_up.write(tmp_path, rows, tasks=("sets",), methods=("dense",)))
    found = [row for row in Page(html).rows if "qasper" in row]
    head = [
        "method",
        "bytes ratio",
        "narrativeqa",
        "qasper",
        "average",
        "gov_report",
        "odd",
        "mean of sets",
        "all samples",
    ]
    assert found == [head]
    at = Page(html).rows.index(head)
    assert Page(html).rows[at - 1] == ["", "single-doc QA", "summaries", "other", "all"]
    spans = [attrs["colspan"] for tag, attrs in Page(html).tags if attrs.get("scope") == "colgroup"]
    assert spans == ["2", "3", "1", "1", "2"]
    values = [cell.split(" / ")[0] for cell in Page(html).rows[at + 1]]
    assert values == ["dense", "0.500", "50.0", "25.0", "37.5", "100.0", "0.0", "43.8", "45.0"]
    assert "averages of groups count each set once" in markdown
    assert "all samples counts each sample once" in markdown


def test_totals_of_their_own_are_named_for_what_they_are(tmp_path, monkeypatch):
    rows = [text_row("sets", "dense", str(i), i % 2, meta={"set": "qasper" if i else "odd"}) for i in range(3)]
    folder = made_up.write(tmp_path, rows, tasks=("sets",), methods=("dense",))
    for how, name, shown in ((None, "all samples", "33.3"), (mean, "mean of sets", "25.0"), (max, "total", "50.0")):
        if how is not None:

            def own(self, rows, how=how):
                sets = {row["meta"]["set"] for row in rows}
                means = [100 * mean(row["score"] for row in rows if row["meta"]["set"] == name) for name in sets]
                return how(means)

            monkeypatch.setattr(made_up.Sets, "total", own)
        found = Page(report(folder)[0]).rows
        at = next(i for i, row in enumerate(found) if "qasper" in row)
        assert (found[at][-1], found[at + 1][-1].split(" / ")[0]) == (name, shown)


def test_average_of_a_group_with_a_set_missing_is_not_given(tmp_path):
    rows = [
        text_row("sets", method, name, 1.0, meta={"set": name})
        for method in ("dense", FOURIER)
        for name in ("narrativeqa", "qasper")
        if (method, name) != (FOURIER, "qasper")
    ]
    html, _ = report(made_up.write(tmp_path, rows, tasks=("sets",)))
    row = next(row for row in Page(html).rows if "– / 1 of 2 sets †" in row)
    assert row[:4] == [FOURIER, "0.500", "100.0 / 0.0", "– / not measured †"]


def test_heat_map(tmp_path):
    rows = [grid_row("dense", f"{n}/{d}", float(d > 0), n, d) for n in (500, 4000) for d in (0.0, 1.0)]
    html, markdown = report(made_up.write(tmp_path, rows, methods=("dense",)))
    assert [row for row in Page(html).rows if len(row) == 3 and row[0] in ("depth ↓ / length →", "0", "1")] == [
        ["depth ↓ / length →", "500", "4,000"],
        ["0", "0", "0"],
        ["1", "100", "100"],
    ]
    assert ["depth ↓; length →", "500", "4,000"] in tables(markdown)[2]
    styles = [attrs["style"] for tag, attrs in Page(html).tags if tag == "td" and "style" in attrs]
    assert len(styles) == 4
    assert styles[0] == styles[1] != styles[2] == styles[3]


@pytest.mark.parametrize("lower", [False, True])
def test_heat_colours(lower):
    colours = {}
    for value in range(0, 101):
        pair = plots.heat_colours(value, 0, 100, lower)
        assert plots.contrast(*([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in pair)) >= 4.5
        colours[value] = pair[0]
    worst, best = colours[100 if lower else 0], colours[0 if lower else 100]
    assert int(worst[1:3], 16) > int(worst[5:7], 16)  # orange
    assert int(best[5:7], 16) > int(best[1:3], 16)  # blue
    assert plots.heat_colours(3, 3, 3, lower)[0] == plots.heat_colours(1, 0, 1)[0]


def test_lines_can_be_told_from_white_and_black():
    for colour in (*plots.COLOURS, plots.GREY):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert plots.contrast(rgb, (255, 255, 255)) >= 3
        assert plots.contrast(rgb, (20, 23, 26)) >= 3


def test_families_differ_in_more_than_the_budget():
    looks = plots.styles(["dense", "a:budget=0.5", "a:budget=0.25", "a:budget=0.25,window=64", "b"])
    assert looks["a:budget=0.5"].colour == looks["a:budget=0.25"].colour
    assert looks["a:budget=0.5"].dash != looks["a:budget=0.25"].dash
    assert len({looks[m].colour for m in ("dense", "a:budget=0.5", "a:budget=0.25,window=64", "b")}) == 4
    assert plots.family("a:budget=0.25,window=64") == plots.family("a:window=64,budget=1") == "a:window=64"
    assert plots.family("nonsense:") == "nonsense:"


def test_loss_table(tmp_path):
    more = dict(meta={"context": 7000}, curve={"loss": [3.2, 3.3], "kl": [0.2, 0.3]}, scored=100)
    rows = [loss_row("nats", "dense", str(i), 3.0, 3.0, 0.0, 1.0, **more) for i in range(6)]
    rows += [loss_row("nats", FOURIER, str(i), 3.25, 3.0, 0.25, 0.875, **more) for i in range(6)]
    html, markdown = report(made_up.write(tmp_path, rows, tasks=("nats",)))
    assert [FOURIER, "7,000", "0.500", "6", "3.250", "+0.250 / ✗ worse", "0.2500", "87.5"] in Page(html).rows
    assert ["dense", "7,000", "0.500", "6", "3.000", "–", "0.0000", "100.0"] in Page(html).rows
    assert ["1 to 64", "0.2000"] in Page(html).rows  # the curve; dense has no KL from itself
    assert ["65 to 100", "0.3000"] in Page(html).rows
    assert any(["65 to 100", "0.3000"] in table for table in tables(markdown))


def test_perplexity_table(tmp_path):
    rows = [loss_row("ppl", "dense", "a", 2.0, meta={"utf8_bytes": 512}), loss_row("ppl", FOURIER, "a", 3.0)]
    html, _ = report(made_up.write(tmp_path, rows, tasks=("ppl",)))
    assert ["dense", "0.500", "1", "7.389", "2.000", "–", "0.7213"] in Page(html).rows
    assert [FOURIER, "0.500", "1", "20.086", "3.000", "+1.000", "–"] in Page(html).rows


def test_intervals_stand_only_where_there_are_samples_to_give_them(tmp_path):
    """Not of five samples, and not of six that are all alike, whose bootstrap would claim to be certain."""
    for count, alike, given in ((5, False, False), (6, True, False), (6, False, True)):
        rows = [grid_row(FOURIER, str(i), 1.0 if alike else i % 2) for i in range(count)]
        folder = made_up.write(tmp_path / f"{count}{alike}", rows, methods=(FOURIER,))
        for text in report(folder):
            assert ("95 %: " in text) is given
        numbers = next(row for row in Page(report(folder)[0]).rows if len(row) == 5 and row[0] == FOURIER)
        assert (numbers[3] != "–") is given


def test_long_curves_are_thinned_in_their_table(tmp_path):
    curve = {"loss": [float(i) for i in range(40)]}
    rows = [loss_row("ppl", "dense", "a", 2.0, curve=curve, scored=2560)]
    html, _ = report(made_up.write(tmp_path, rows, tasks=("ppl",), methods=("dense",)))
    assert ["1 to 192", "1.000"] in Page(html).rows
    assert ["2,497 to 2,560", "39.000"] in Page(html).rows


def test_speed_and_bytes(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid(count=2), methods=("dense", FOURIER)))
    assert ["dense", "0.500", "2", "1.00", "2.00", "450", "8.0"] in Page(html).rows
    assert "not a benchmark" in html
    assert "not a benchmark" in markdown


def test_missing_samples_are_marked(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid(lost=[(FOURIER, 5), (FOURIER, 4)])))
    for text in (html, markdown):
        assert re.search(r"† grid: fourier:budget=0\.25 has 4 of 6 samples\.", text)
    cell = Page(html).rows[2][2]
    assert cell.startswith("75.0 † / ")
    assert cell.endswith("n 4/6")
    assert tables(markdown)[0][3][2].startswith("75.0 †; ")


def test_a_method_without_any_sample_is_shown_as_missing(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid(methods=("dense",)), methods=("dense", FOURIER)))
    assert Page(html).rows[2] == [FOURIER, "– / not measured †", "– / not measured †"]
    assert "none of 6 samples" in html
    assert "none of 6 samples" in markdown


def test_non_finite_scores_are_named(tmp_path):
    rows = grid()
    rows[-1]["score"] = None
    html, markdown = report(made_up.write(tmp_path, rows))
    for text in (html, markdown):
        assert "1 score is not finite for fourier:budget=0.25, left out (5)" in text
    assert Page(html).rows[2][2].startswith("60.0 †")


def test_unreadable_and_unknown_lines_are_reported(tmp_path):
    folder = made_up.write(tmp_path, [*grid(), text_row("other", "dense", "a", 1.0)])
    with (folder / "samples.jsonl").open("a") as file:
        short = grid_row("dense", "short", 1.0)
        del short["prefill_seconds"]
        file.write(json.dumps(short) + '\n{"task": "gr\n')
    html, markdown = report(folder)
    for text in (html, markdown):
        assert "samples.jsonl, line 15: not a result" in text
        assert "Results of dense on other are left out" in text
        assert "1 result left out: without context, rows, prefill" in text


def test_a_task_without_rows_is_named(tmp_path):
    html, _ = report(made_up.write(tmp_path, grid(), tasks=("grid", "ppl")))
    assert "ppl: no scores yet" in html


def test_one_method_and_no_dense(tmp_path):
    html, markdown = report(made_up.write(tmp_path, grid(methods=(FOURIER,)), methods=(FOURIER,)))
    assert Page(html).rows[1] == [FOURIER, "0.500", "100.0"]
    assert "Dense was not measured" in markdown
    assert "dashed line" not in html


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


def test_markdown_escapes():
    assert escape_markdown("a|b *c* <d> & `e`\n[f]") == r"a\|b \*c\* &lt;d&gt; &amp; \`e\` \[f\]"
    assert escape_markdown(Done("a|b")) == "a|b"
    assert fence(["echo ```"]) == "````sh\necho ```\n````"


def test_commands_that_name_other_tasks_are_not_shown():
    commands = [
        "run --task a --method x",
        "run --task=b",
        "run --recipe r.yaml",
        "run --task 'a",
        "run --task a --method x",
    ]
    header = {"tasks": {"a": {}, "b": {}}, "runs": [{"command": command} for command in commands]}
    assert measured_by(header, ["a"]) == [commands[0], commands[2], commands[3]]
    assert measured_by(header, ["b"]) == [commands[1], commands[2], commands[3]]
    assert measured_by({**header, "runs": [{"command": ""}]}, ["a"]) == ["(run from Python: no command was recorded)"]


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


def test_charts_draw_what_they_are_given():
    looks = plots.styles(["dense", "a:budget=0.5", "a:budget=0.25"])
    points = [plots.Point("dense", 1.0, 80, (70, 90)), plots.Point("a:budget=0.5", 0.5, 60, (50, 70))]
    points.append(plots.Point("a:budget=0.25", 0.25, 40))
    chart = plots.quality_chart(points, looks, "score, 0 to 100", 'a "chart"', "one")
    assert chart.startswith('<svg class="chart" role="img" aria-label="a &quot;chart&quot;" viewBox="0 0 ')
    assert chart.endswith("</svg>")
    assert ">score, 0 to 100</text>" in chart
    assert chart.count(plots.COLOURS[0]) >= 3
    assert not re.search(r'id="(?!one-)|font-family|<style|<metadata', chart)
    assert chart == plots.quality_chart(points, looks, "score, 0 to 100", 'a "chart"', "one")
    faded = plots.quality_chart(points, looks, "score, 0 to 100", "", "one", lit={"b"})
    assert plots.COLOURS[0] not in faded
    assert faded.count(plots.GREY) > chart.count(plots.GREY)


def numbers(chart, unit):
    """The numbers on the axes of a chart: of ratios, of scores."""
    found = re.findall(r">([^<>]+)</text>", chart)
    at = found.index("bytes held / bytes of a dense cache")
    return [float(text) for text in found[:at]], [float(text.replace("−", "-")) for text in found[at + 1 : -1]]


@pytest.mark.parametrize(
    ("scores", "ends", "least", "most"),
    [
        ((97.0, 100.0), (0, 100), 90, 100),
        ((0.0, 3.0), (0, 100), 0, 10),
        ((0.0, 100.0), (0, 100), 0, 100),
        ((7.1, 7.4), None, 7.0, 7.5),
        ((0.00002, 0.3), None, 0, 1),
    ],
)
def test_axes_fit_the_scores(scores, ends, least, most):
    points = [plots.Point(f"a:budget={i}", 0.4 + 0.1 * i, value) for i, value in enumerate(scores)]
    looks = plots.styles([point.method for point in points])
    x, y = numbers(plots.quality_chart(points, looks, "u", "", "one", ends), "u")
    assert min(x) == 0
    assert max(x) == 1
    assert len(y) > 2
    assert least <= min(y) <= max(y) <= most
    if max(scores) / max(min(scores), 1e-9) > plots.STEEP and ends is None:
        assert y == [0, 0.001, 0.01, 0.1, 1][: len(y)]


def test_ratios_that_are_halved_stand_on_an_axis_of_halves():
    points = [plots.Point(f"a:budget={ratio}", ratio, 50) for ratio in (0.0625, 0.125, 0.25, 0.5)]
    chart = plots.quality_chart(points, plots.styles([p.method for p in points]), "u", "", "one", (0, 100))
    assert numbers(chart, "u")[0] == [0.0625, 0.125, 0.25, 0.5, 1]


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


def test_a_killed_run_says_what_is_missing(tmp_path):
    folder = made_up.write(tmp_path, grid(), samples={"grid": {"500": 100}})
    html, _ = report(folder)
    assert "of 100 samples" in html


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


def test_many_incomplete_methods_are_one_note(tmp_path):
    methods = ["dense", *(f"m{i}:budget=0.5" for i in range(20))]
    lost = [(f"m{i}:budget=0.5", 5) for i in range(1, 6)] + [("m0:budget=0.5", i) for i in range(6)]
    rows = grid(methods, lost=lost)
    html, markdown = report(made_up.write(tmp_path, rows, methods=methods))
    assert "† grid: of 21 methods, 15 have all 6 samples, 5 a part of them, 1 none" in markdown
    assert html.count("† grid") == 1
    assert "| m0:budget=0.5 | –; not measured † |" in markdown
    assert "of 14 methods that have all samples" in markdown


def test_budgets_in_order():
    methods = ["dense", "a:budget=0.125", "b:budget=2GiB", "c:budget=0.5", "d:store=kivi,budget=0.125", "[e", "f"]
    assert by_budget(methods) == [
        ("budget 0.5", ["dense", "c:budget=0.5"]),
        ("budget 0.125", ["dense", "a:budget=0.125", "d:store=kivi,budget=0.125"]),
        ("budget 2GiB", ["dense", "b:budget=2GiB"]),
        ("no budget", ["dense", "[e", "f"]),
    ]
