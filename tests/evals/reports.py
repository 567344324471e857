"""Reports of made-up folders, read back."""

import re
from html.parser import HTMLParser

from longwave.evals.report import write_report
from tests.evals.made_up import text_row

FOURIER = "fourier:budget=0.25"


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
