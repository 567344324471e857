"""docs/models.md: its table is made of the rows; what stands around it is written by hand."""

import re
from pathlib import Path

from longwave.shape import other_layers, states_beside
from tests.models.checks import config_of
from tests.models.table import ROWS, YET, Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BLOCK = re.compile(r"(<!-- python -m tests.models writes this table -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {
    "DynamicSlidingWindowLayer": "sliding",
    "LinearAttentionLayer": "linear, with a state",
    "LinearAttentionAndSlidingWindowAttentionLayer": "sliding, beside a state",
    "DummyLayer": "none of their own",
}


def line(row: Row) -> str:
    """A row of the table, from its configuration."""
    if row.refused:
        return f"| {row.name} | `{row.kind}` | | refused: {row.refused.removesuffix(f': {YET}')} |"
    config = config_of(row).get_text_config(decoder=True)
    others = {KINDS[type(layer).__name__] for layer in other_layers(config) if layer is not None}
    if states_beside(config):
        others.add("beside each layer a state")
    does = "; ".join(filter(None, ["works", row.but, row.unpaged]))
    return f"| {row.name} | `{row.kind}` | {'; '.join(sorted(others))} | {does} |"


def table() -> str:
    head = ["| model | transformers' name | its other layers | longwave |", "|---|---|---|---|"]
    return "\n".join([*head, *map(line, ROWS)]) + "\n"


def written() -> str:
    """The page with the table of today."""
    return BLOCK.sub(lambda found: found[1] + table() + found[2], PAGE.read_text())
