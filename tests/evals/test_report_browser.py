"""The report as a browser shows it, on a desk and on a phone, light and dark."""

import os
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from longwave.evals import tasks
from longwave.evals.plots import contrast
from longwave.evals.report import write_report
from tests.evals import made_up

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SIZES = {"desk": (1280, 900), "phone": (390, 844)}

# Text nodes with what the checks need: size after an SVG's scaling, colour, and the first colour painted below it.
TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement, svg = parent.closest('svg.chart');
    if (!node.textContent.trim()) continue;
    const style = getComputedStyle(parent);
    let below = parent;
    while (below && getComputedStyle(below).backgroundColor === 'rgba(0, 0, 0, 0)') below = below.parentElement;
    found.push({
      text: node.textContent.trim().slice(0, 60),
      size: parseFloat(style.fontSize) * (svg ? svg.clientWidth / svg.viewBox.baseVal.width : 1),
      ink: svg ? style.fill : style.color,
      back: getComputedStyle(below).backgroundColor,
      heat: !!parent.closest('table.heat td'),
    });
  }
  return found;
}"""
# Cells whose text is wider or taller than they are.
SPILLED = """() => [...document.querySelectorAll('th, td')].filter(cell => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  const text = range.getBoundingClientRect(), box = cell.getBoundingClientRect();
  if (!text.width) return false;
  const beside = text.left < box.left - 1 || text.right > box.right + 1;
  return beside || text.top < box.top - 1 || text.bottom > box.bottom + 1;
}).map(cell => cell.textContent)"""
# Texts of a chart that cover each other or leave it.
COLLIDING = """() => [...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const whole = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  const out = boxes.filter(([, b]) => b.left < whole.left - 1 || b.right > whole.right + 1
    || b.top < whole.top - 1 || b.bottom > whole.bottom + 1).map(([text]) => text + ' leaves the chart');
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
      out.push(one + ' covers ' + other);
  }));
  return out;
})"""
# Where every figure, chart and table stands; tables may be wider than the scroll container around them.
PLACES = """() => [...document.querySelectorAll('figure, svg.chart, .scroll, table')].map(thing => {
  const box = thing.getBoundingClientRect(), frame = thing.closest('.scroll');
  return {what: thing.tagName + '.' + thing.className.toString(), left: box.left, right: box.right, width: box.width,
    height: box.height, framed: thing.tagName === 'TABLE' && !!frame && getComputedStyle(frame).overflowX === 'auto'};
})"""


def chromium():
    names = [os.environ.get("LONGWAVE_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def absent(what):
    """A machine of CI has to have it; elsewhere the tests are skipped."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI is set: the report would go unchecked")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed")
    path = chromium()
    if path is None:
        absent("there is no chromium here; name one in $LONGWAVE_CHROMIUM")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=[*ARGS, "--disable-sync"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, task in made_up.TASKS.items():
            patch.setitem(tasks.TASKS, name, task)
        folder = made_up.everything(tmp_path_factory.mktemp("results"))
        return write_report([folder], folder)[0]


@pytest.fixture(scope="module", params=["desk light", "desk dark", "phone light", "phone dark"])
def page(request, browser, report: Path):
    size, scheme = request.param.split()
    width, height = SIZES[size]
    opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened.told, opened.asked = [], []
    opened.on("console", lambda message: opened.told.append(message.text))
    opened.on("pageerror", lambda error: opened.told.append(str(error)))
    opened.on("dialog", lambda dialog: (opened.told.append(dialog.message), dialog.dismiss()))
    opened.on("request", lambda asked: opened.asked.append(asked.url))
    opened.goto(report.as_uri())
    opened.screenshot_closed = opened.screenshot()
    opened.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    yield opened
    opened.close()


def colours(png, path):
    path.write_bytes(png)
    return len(np.unique((matplotlib.image.imread(path)[..., :3] * 255).astype(int).reshape(-1, 3), axis=0))


def rgb(text):
    return [float(part) for part in text.partition("(")[2].rstrip(")").split(",")[:3]]


def test_runs_nothing_and_asks_for_nothing(page):
    assert page.told == []
    assert page.asked
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []
    assert page.locator("script").count() == 0
    assert made_up.HOSTILE in page.locator("body").inner_text()


def test_never_scrolls_sideways(page):
    width, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= room == page.viewport_size["width"]


def test_everything_is_in_sight(page):
    places = page.evaluate(PLACES)
    kinds = [place["what"] for place in places]
    assert sum(kind.startswith("svg") for kind in kinds) == 7  # a chart a task, and curves of three columns
    assert sum("heat" in kind for kind in kinds) == len(made_up.METHODS)
    for place in places:
        assert place["width"] > 40, place
        assert place["height"] > 20, place
        if not place["framed"]:
            assert place["left"] >= 0, place
            assert place["right"] <= page.viewport_size["width"], place


def test_text_stays_in_its_place(page):
    assert page.evaluate(SPILLED) == []
    assert page.evaluate(COLLIDING) == []


def test_text_can_be_read(page):
    texts = page.evaluate(TEXTS)
    assert len([text for text in texts if text["heat"]]) == 30 * len(made_up.METHODS)
    assert [text for text in texts if text["size"] < 11] == []
    assert [text for text in texts if contrast(rgb(text["ink"]), rgb(text["back"])) < 4.5] == []


def test_commands_stand_under_every_figure(page):
    figures = page.locator("figure").all()
    assert page.locator("table").count() == page.locator("figure table").count()
    for figure in figures:
        caption = figure.locator("figcaption")
        assert caption.locator(".count").inner_text().startswith("n = ")
        assert "longwave eval run" in caption.locator("pre").inner_text()
        assert caption.bounding_box()["y"] >= figure.locator(".panel, svg.chart").first.bounding_box()["y"]


def test_first_column_stays_while_a_table_scrolls(page):
    frame = page.locator("section:has(h2:text-is('sets')) .scroll").first
    moved = frame.evaluate("""frame => {
      const cell = frame.querySelector('tbody th'), before = cell.getBoundingClientRect().left;
      frame.scrollLeft = 200;
      const result = [frame.scrollLeft, cell.getBoundingClientRect().left - before];
      frame.scrollLeft = 0;
      return result;
    }""")
    assert moved[0] > 100  # or nothing was scrolled
    assert abs(moved[1]) < 1


def test_is_not_blank(page, tmp_path):
    assert colours(page.screenshot_closed, tmp_path / "page.png") > 50
    charts = page.locator("svg.chart")
    for chart in (charts.first, charts.last):
        assert colours(chart.screenshot(), tmp_path / "chart.png") > 20
