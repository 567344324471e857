"""Every picture of docs/results again, from the rows committed beside it.

python -m benchmarks.plots [--out FOLDER]
"""

import argparse
import json
from pathlib import Path

from benchmarks import codec_plot, frontier, plot_diffusion_pair, plot_kernels

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PICTURES = {
    "frontier/frontier.svg": lambda path: frontier.plot(frontier.committed(), path),
    "codec/bytes.svg": lambda path: codec_plot.plot(codec_plot.lines(), path),
    "diffusion/pair.svg": lambda path: plot_diffusion_pair.plot(
        [json.loads(line) for line in (RESULTS / "diffusion" / "pair.jsonl").read_text().splitlines()], path
    ),
    "kernels/h200.svg": lambda path: plot_kernels.plot(
        json.loads((RESULTS / "kernels" / "h200.json").read_text()), path
    ),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where they go; docs/results")
    out = parser.parse_args(argv).out
    for name, draw in PICTURES.items():
        draw(out / name)
        print(out / name)


if __name__ == "__main__":
    main()
