"""The table of docs/methods.md, asked of the code: `python -m tests.methods.page` writes it."""

from pathlib import Path

import longwave
from longwave.cli.listing import first_line
from longwave.decode import supports
from longwave.methods import METHODS
from tests.conftest import build
from tests.matrix import LOSSY

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- made by python -m tests.methods.page -->\n", "<!-- end -->\n"

# name -> (number on arXiv or openreview, where it loses: by its construction, unless a page with measurements is named)
ABOUT = {
    "dense": ("", "bytes: it keeps everything"),
    "fourier": ("2506.11886", "below a tenth of the bytes: [fourier](fourier.md)"),
    "fourier-paper": ("2506.11886", "long contexts: [fourier](fourier.md)"),
    "kivi": ("2402.02750", "2 bits: [kivi](kivi.md)"),
    "think": (
        "2407.21018",
        "bytes: values stay whole, never below half; worse than codes of an eighth: [think](think.md)",
    ),
    "palu": ("2407.21118", "time: keys are rebuilt in every step: [palu](palu.md)"),
    "quest": ("2406.10774", "bytes: it holds everything: [quest](quest.md)"),
    "longcache": (
        "2407.15176",
        "bytes: it holds everything; needles among their likes: [longcache](longcache.md)",
    ),
    "streaming": (
        "2309.17453",
        "whatever stood in between: [evicting](evicting.md)",
    ),
    "snapkv": (
        "2404.14469",
        "a question that comes later: [evicting](evicting.md)",
    ),
    "pyramidkv": (
        "2406.02069",
        "as snapkv; models whose last layers look far back",
    ),
    "adakv": ("2407.11550", "as snapkv, and no better with three heads: [evicting](evicting.md)"),
    "speckv": (
        "2506.08373",
        "a draft that writes on otherwise; a prompt read without `longwave.look_ahead` is refused",
    ),
    "h2o": ("2306.14048", "sums favour old tokens: [evicting](evicting.md)"),
    "tova": ("2401.06104", "one query speaks for all heads; heads of other habits"),
    "treekv": ("2501.04987", "old facts: far back one token stands for a stretch"),
    "knorm": ("2406.11430", "it asks no query; models whose key norms say nothing"),
    "expected_attention": (
        "2510.00636",
        "queries to come that are unlike the last; a rotation that cannot be undone is refused",
    ),
    "kvzip": (
        "2505.23416",
        "it reads twice and holds all meanwhile; what is written afterwards: [evicting](evicting.md)",
    ),
    "attention_matching": (
        "2602.16284",
        "facts that no reference query asks for: [evicting](evicting.md)",
    ),
    "sparse_dllm": ("2508.02558", "one mean query and one set for all heads of a layer: [diffusion](diffusion.md)"),
    "weightedkv": ("2503.01330", "a folded value answers to its neighbour's key"),
    "cam": (
        "LCTmppB165",
        "norms of values grow, and it is random (seed)",
    ),
    "sirllm": (
        "2405.12528",
        "a prompt lies dense in all layers until it is read; to streaming: [evicting](evicting.md)",
    ),
    "infllm": ("2402.04617", "order among far tokens; bytes: it holds everything: [longcache](longcache.md)"),
    "actqkv": ("2502.13542", "as infllm; in steps it is infllm by cosines: [longcache](longcache.md)"),
    "longheads": (
        "2402.10685",
        "time in a prompt: every query gathers; bytes: it holds everything: [longcache](longcache.md)",
    ),
    "lm_infinite": ("2308.16137", "whatever stood in between; bytes: it holds all: [extension](extension.md)"),
    "dual_chunk": ("2402.17463", "distances beyond the chunk before; bytes: it holds all: [extension](extension.md)"),
    "self_extend": ("2401.01325", "order within a far group; bytes: it holds all: [extension](extension.md)"),
}
# places in pages that several methods share; else a method's page has its name, or it is a line of its base's
PAGES = {"dense": "design.md", "fourier-paper": "fourier.md#fourier-paper", "speckv": "draft.md#speckv"}
PAGES |= {name: f"longcache.md#{name}" for name in ("infllm", "actqkv", "longheads")}
BASES = {longwave.Evicting: "evicting", longwave.Remapped: "extension"}
HEAD = ("method", "paper", "idea", "holds `tokens`", "slots", "pages", "device steps", "4D masks", "where it loses")


def accepts(cls, **options):
    """Whether a method takes these options."""
    try:
        cls(**options)
    except (TypeError, ValueError):  # TypeError: it has no such option
        return False
    return True


def watches(bound):
    return bound.needs.watches or bool(bound.needs.again) or (bool(bound.needs.queries) and not bound.layer(0).hints)


def page_of(name, cls):
    """Where docs/ tells of a method."""
    if (PAGE.parent / f"{name}.md").exists():
        return f"{name}.md"
    return PAGES.get(name) or next(f"{page}.md#{name}" for base, page in BASES.items() if issubclass(cls, base))


def table():
    model = build("llama")
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for name, cls in METHODS.items():
        paper, loses = ABOUT[name]
        memory = LOSSY[name](model) if name in LOSSY else longwave.cache(model, name)
        flags = (
            accepts(cls, tokens=1000),
            accepts(cls, positions="slots"),
            accepts(cls, store="kivi"),
            supports(model, memory) is None,
            not watches(memory.method) and memory.method.reads_exactly,
        )
        home = "https://arxiv.org/abs/" if "." in paper else "https://openreview.net/forum?id="
        cells = (
            f"[`{name}`]({page_of(name, cls)})",
            f"[{paper}]({home}{paper})" if paper else "",
            first_line(cls),
            *("yes" if flag else "" for flag in flags),
            loses,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    text = PAGE.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(text[:start] + table() + text[end:])


if __name__ == "__main__":
    main()
