"""Plot of real bytes against KL: what lies coded, KVTC's form, and what is read in pages, from the committed rows.

    python -m benchmarks.codec_plot [--out docs/results/codec/bytes.svg]

Bytes are of the middle, over those of the same K and V in 16 bits; 24 unseen windows of 3,000 tokens of text.
"""

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.frontier import middle_ratio
from longwave.evals import style

HERE = Path(__file__).parents[1] / "docs" / "results"
STYLES = {
    "coded": style.line(3),
    "coded: answers for hidden facts": style.line(3, dash=2) | {"markerfacecolor": "white"},
    "KVTC's form, built by us": style.line(2),
    "fourier": style.line(0),
    "kivi": style.line(1),
}


def rows_of(file, name):
    """(bytes, KL) of a row of benchmarks/codec.py, by bytes."""
    rows = json.loads((HERE / "codec" / file).read_text())["rows"]
    return sorted((row["bytes"], row["kl"]) for row in rows if row["row"] == name)


def pages(prefix):
    """(bytes, KL) of a method's own plans, of the frontier's samples."""
    found = {}
    for line in (HERE / "frontier" / "divergence.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["context"] == 3000 and row["method"].startswith(prefix) and "plan" not in row["method"]:
            found.setdefault(row["method"], []).append(row["metrics"]["kl"])
    return sorted((middle_ratio(method, 3000), statistics.mean(kls)) for method, kls in found.items())


def lines():
    return {
        "coded": rows_of("text-3000.json", "all steps"),
        "coded: answers for hidden facts": rows_of("recall.json", "all steps"),
        "KVTC's form, built by us": rows_of("kvtc.json", "KVTC's form"),
        "fourier": pages("fourier:"),
        "kivi": pages("kivi:"),
    }


@style.paper()
def plot(drawn, path):
    figure = style.blank(3.6, width=5.6)
    axes = figure.add_subplot()
    for name, points in drawn.items():
        axes.plot(*zip(*points, strict=True), label=name, **STYLES[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    sizes = [0.0001, 0.001, 0.01, 0.1]
    axes.set_yticks(sizes, [f"{size:g}" for size in sizes], minor=False)
    axes.set_xlabel("bytes of the middle, of K and V in 16 bits")
    axes.set_ylabel("KL from dense, nats a token")
    axes.legend(loc="lower left")
    style.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "codec" / "bytes.svg")
    plot(lines(), parser.parse_args().out)


if __name__ == "__main__":
    main()
