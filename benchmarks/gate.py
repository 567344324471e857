"""Regression gate: measure gate.yaml and fail where a number leaves its recorded band.

    python -m benchmarks.gate            (make quality)
    python -m benchmarks.gate --record   after a change that is meant to move the numbers; look at the difference

A band is the recorded value plus and minus what another machine's rounding may change. A compressed method that gets
better leaves its band too: record it, so that the next one who makes it worse is told.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from longwave.cli.common import load_model
from longwave.cli.console import show_table
from longwave.evals.evaluation import evaluate
from longwave.evals.recipe import make_recipe
from longwave.evals.results import load
from longwave.evals.summary import finite, line, task_of

HERE = Path(__file__).parent
RELATIVE, NEEDLES, RATIO = 0.10, 17.0, 0.005  # of a divergence; of 100, one needle of six; of a bytes ratio


def measure(file):
    """{task: {method: {"value", "ratio"}}} of a fresh run."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(file, out=Path(folder) / "gate")
        evaluate(
            recipe, load_model, "make quality", lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr)
        )
        print(file=sys.stderr)
        loaded = load(recipe.out)
    found = {}
    for label in recipe.tasks:
        for method in recipe.methods:
            rows = [row for row in loaded.rows if (row["task"], row["method"]) == (label, method)]
            bad = sum(not finite(row) for row in rows)
            if bad:
                raise ValueError(f"{method} on {label}: {bad} of {len(rows)} scores are not finite")
            all_of_it = line(task_of(loaded, label), label, method, "", rows, [])
            now = {"value": round(all_of_it.value, 5), "ratio": round(all_of_it.ratio, 4)}
            found.setdefault(label, {})[method] = now
    return found


def check(bands, found):
    """Rows (task, method, what, recorded, now, verdict) and whether all is well."""
    rows, well = [], True
    for task, methods in bands.items():
        for method, recorded in methods.items():
            now = found.get(task, {}).get(method)
            for what in ("value", "ratio"):
                if now is None:
                    verdict = "MISSING"
                else:
                    width = (
                        RATIO
                        if what == "ratio"
                        else NEEDLES
                        if task.startswith("needle")
                        else RELATIVE * recorded[what]
                    )
                    verdict = "ok" if abs(now[what] - recorded[what]) <= width + 1e-4 else "OUTSIDE"
                well &= verdict == "ok"
                rows.append([task, method, what, recorded[what], now[what] if now else "-", verdict])
    for task, methods in found.items():
        for method in methods.keys() - bands.get(task, {}).keys():
            rows.append([task, method, "value", "-", methods[method]["value"], "NOT RECORDED"])
            well = False
    return rows, well


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=HERE / "gate.yaml")
    parser.add_argument("--bands", type=Path, default=HERE / "gate.json")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    try:
        found = measure(args.recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"gate: {error}")
    if args.record:
        args.bands.write_text(json.dumps(found, indent=1) + "\n")
        print(f"recorded {args.bands}")
        return
    try:
        bands = json.loads(args.bands.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"gate: cannot read {args.bands} ({error}); --record writes it")
    rows, well = check(bands, found)
    show_table("quality gate", ["task", "method", "what", "recorded", "now", "verdict"], rows)
    if not well:
        sys.exit("gate: a number left its band")


if __name__ == "__main__":
    main()
