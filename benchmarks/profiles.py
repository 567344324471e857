"""Measure the profiles that ship with the package: python -m benchmarks.profiles [--device cuda] [--out FOLDER]"""

import argparse
from pathlib import Path

import longwave
from benchmarks.texts import calibration_texts
from longwave.calibrate import calibrate

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(longwave.__file__).parent / "profiles")
    args = parser.parse_args()
    model, tokenizer = longwave.load("smollm2")
    model.to(args.device)
    texts = list(calibration_texts().values())
    for name, method in {"smollm2": longwave.Fourier(), "smollm2-paper": longwave.Fourier.paper()}.items():
        profile = calibrate(model, tokenizer, texts, method, tokens=4096, windows=12, model_id="smollm2")
        profile.save(args.out / f"{name}.json")
        print(f"{args.out / name}.json: {profile.text}")
