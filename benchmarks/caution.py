"""How much more than its mean cost a merged head should count when plans are made: KL by `planner.CAUTION`.

    python -m benchmarks.caution [--profile FILE ...] [--caution 0,0.5,1,2] [--judged 8] [--device cuda] [--out FILE]

Merging loses nothing in most windows and much in a few, so what it was measured to cost on some windows is less than
what it will cost. Each profile (default: the one that ships) is planned with every caution, in windows more in which a
head loses what the median head loses in its worst, and once without merging; the plans are judged on unseen windows.
Budgets are of 16-bit numbers.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

import longwave
from benchmarks.hybrid import opened
from benchmarks.sensitivity import BUDGETS, Judge
from longwave.cli.console import show_table
from longwave.plan import planner
from longwave.plan.profile import Profile
from longwave.shape import CacheShape

SHIPPED = Path(longwave.__file__).parent / "plan" / "profiles" / "smollm2.json"
NEVER = "never"  # merged


def planned(shape, profile, caution, share):
    """The plan that a caution makes; the planner's own is put back."""
    usual = planner.CAUTION
    if caution == NEVER:
        sensitivity = dataclasses.replace(profile.sensitivity, both=torch.full_like(profile.sensitivity.both, 1e3))
        profile = dataclasses.replace(profile, sensitivity=sensitivity)
    planner.menu.cache_clear()
    try:
        planner.CAUTION = usual if caution == NEVER else caution
        return longwave.Fourier().bind(shape, profile, share)
    finally:
        planner.CAUTION = usual
        planner.menu.cache_clear()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--model", default="smollm2-q4", help="or the folder of benchmarks.hybrid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--profile", type=Path, action="append", default=[])
    parser.add_argument("--caution", type=numbers, default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--budgets", type=numbers, default=list(BUDGETS))
    parser.add_argument("--judged", type=int, default=8, help="unseen windows")
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--judge-text", default="mixed", help="task divergence's text=, or a file")
    parser.add_argument("--recall", action="store_true", help="judge answers for facts hidden in the windows")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = opened(args.model, args.dtype)
    model.to(args.device)
    shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
    judge, found = Judge(model, tokenizer, args.judged, args.context, 256, args.judge_text, args.recall), []
    profiles = {file.stem: Profile.load(file) for file in args.profile or [SHIPPED]}
    for name, profile in profiles.items():
        for caution in (*args.caution, NEVER):
            for budget in args.budgets:
                row = {"profile": name, "caution": caution, "budget": budget}
                try:
                    bound = planned(shape, profile, caution, budget * 2 / model.dtype.itemsize)
                except ValueError as error:
                    found.append(row | {"refused": str(error)})
                    continue
                kl, error, loss = judge(lambda bound=bound: longwave.cache(model, bound))
                merged = sum(code.merged for layer in bound.plan for code in layer.k)
                found.append(row | {"merged": merged, "kl": kl, "error": error, "loss": loss})
                print(found[-1], flush=True)
    cell = {(r["profile"], r["caution"], r["budget"]): f"{r['kl']:.5f}" if "kl" in r else "refused" for r in found}
    rows = [(name, caution) for name in profiles for caution in (*args.caution, NEVER)]
    show_table(
        "KL from dense by caution",
        ["", *map(str, args.budgets)],
        [[f"{name}, {caution}", *(cell[name, caution, budget] for budget in args.budgets)] for name, caution in rows],
    )
    if args.out:
        arguments = {"arguments": vars(args), "dense_loss": judge.dense(), "rows": found}
        args.out.write_text(json.dumps(arguments, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
