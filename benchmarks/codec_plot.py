"""Plot of real bytes against KL: what lies coded, KVTC's form, and what is read in pages, from the committed rows.

    python -m benchmarks.codec_plot [--out docs/results/codec/bytes.png]

Bytes are of the middle, over those of the same K and V in 16 bits; 24 unseen windows of 3,000 tokens of text.
"""

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.frontier import middle_ratio

HERE = Path(__file__).parents[1] / "docs" / "results"
STYLES = {
    "coded": "C2o-",
    "coded: answers for hidden facts": "C2^:",
    "KVTC's form, built by us": "C4s-",
    "fourier": "C0o-",
    "kivi": "C3D-",
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "codec" / "bytes.png")
    args = parser.parse_args()
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in lines().items():
        axes.plot(*zip(*points, strict=True), STYLES[name], label=name, markersize=5, linewidth=1.3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.25, 0.5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("bytes of the middle, of K and V in 16 bits")
    axes.set_ylabel("KL from dense, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
