"""Measure the profiles that ship with the package, on the text that ships with it.

python -m benchmarks.profiles [--device cuda] [--out FOLDER] [--windows 15]
"""

import argparse
import time
from pathlib import Path

import longwave
from longwave.cli.console import progress
from longwave.plan.automatic import own_texts
from longwave.plan.calibrate import calibrate

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(longwave.__file__).parent / "plan" / "profiles")
    parser.add_argument("--windows", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--only", choices=["smollm2", "smollm2-paper"])
    args = parser.parse_args()
    model, tokenizer = longwave.load("smollm2-q4", dtype="float32")
    model.to(args.device)
    for name, method in {"smollm2": longwave.Fourier(), "smollm2-paper": longwave.FourierPaper()}.items():
        if args.only not in (None, name):
            continue
        began = time.perf_counter()
        with progress(name) as advance:
            profile = calibrate(
                model,
                tokenizer,
                own_texts(),
                method,
                tokens=args.tokens if name == "smollm2" else 4096,
                windows=args.windows if name == "smollm2" else 8,
                probes=args.probes,
                batch=args.batch,
                model_id="smollm2",
                progress=advance,
            )
        profile.save(args.out / f"{name}.json")
        print(f"{args.out / name}.json: {profile.text}, {time.perf_counter() - began:.0f} s")
