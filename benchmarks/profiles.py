"""Measure the profiles that ship with the package.

    python -m benchmarks.profiles [--device cuda] [--out FOLDER] [--windows 30] [--scored 256]

A killed run goes on from the part file it left in FOLDER.
"""

import argparse
import time
from pathlib import Path

import longwave
from benchmarks.texts import calibration_texts
from longwave.plan.calibrate import calibrate

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(longwave.__file__).parent / "plan" / "profiles")
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--batch", type=int, default=15)
    parser.add_argument("--only", choices=["smollm2", "smollm2-paper"])
    args = parser.parse_args()
    model, tokenizer = longwave.load("smollm2")
    model.to(args.device)
    texts = list(calibration_texts().values())
    for name, method in {"smollm2": longwave.Fourier(), "smollm2-paper": longwave.FourierPaper()}.items():
        if args.only not in (None, name):
            continue
        began = time.perf_counter()
        profile = calibrate(
            model,
            tokenizer,
            texts,
            method,
            tokens=3072 if name == "smollm2" else 4096,
            windows=args.windows if name == "smollm2" else 12,
            scored=args.scored,
            batch=args.batch,
            partial=args.out / f"{name}.json.part",
            model_id="smollm2",
        )
        profile.save(args.out / f"{name}.json")
        print(f"{args.out / name}.json: {profile.text}, {time.perf_counter() - began:.0f} s")
