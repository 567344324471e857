"""How pictures look: one style for reports, for docs/ and for a paper.

Lines differ in colour, mark and dash at once, so that they can be told in grey and by readers who see fewer colours.
`INKS`, for pictures on white, also differ in lightness, and stay apart for the three kinds of colour blindness;
`COLOURS`, for pages that may be light or dark, have to stand out from both, so that marks and dashes tell them in grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

GREY = "#808080"
COLOURS = ("#2f7fd1", "#d2691e", "#1f9a6d", "#b05fc4", "#d4507f", "#8a7d1f", "#1c93a5")
INKS = ("#004de8", "#ff6680", "#604000", "#ac45ac", "#8e8e00", "#172f3b")
MARKS = ("o", "D", "s", "^", "v", "P")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
WIDTH = 7.0  # inches: the text of a page, two columns of a paper
FONT = 8  # points, at that width

SHARED: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
    "errorbar.capsize": 2,
    "svg.hashsalt": "longwave",  # or every picture would have ids of its own
}
PAPER = SHARED | {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": FONT,
    "axes.titlesize": FONT,
    "figure.titlesize": FONT + 1,
    "xtick.labelsize": FONT - 0.5,
    "ytick.labelsize": FONT - 0.5,
    "legend.fontsize": FONT - 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "svg.fonttype": "path",
}


def paper() -> Any:
    """A context in which matplotlib draws for a page of a paper; a decorator too."""
    from matplotlib import rc_context

    return rc_context(PAPER)


def blank(height: float, width: float = WIDTH) -> Any:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def line(number: int, dash: int = 0) -> dict[str, Any]:
    """What `plot` and `errorbar` take for the line of that number: ink and mark, and a dash."""
    return {"color": INKS[number], "marker": MARKS[number], "linestyle": (0, DASHES[dash]) if dash else "-"}


def save(figure: Any, path: Path) -> None:
    """As SVG or PNG by the name of the file, the same bytes every time that one matplotlib draws it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=200, metadata=metadata)
