"""The other side of benchmarks/outside.py: kvpress reads the same prompts, in an environment without longwave.

    /tmp/kvpress/bin/python benchmarks/presses.py FOLDER        (outside.py calls it)

FOLDER holds prompts.safetensors, ids int64 [windows, context + scored + 1], and job.json with model, context, scored
and presses, [[name, compression ratio], ...]. For each it gets NAME-RATIO.safetensors, and keeps one that is there:
    kept    bool [windows, layers, kv_heads, n]: which tokens stay, of ThinK which channels
    score   float32, as kept, NaN where the press has none
    kl      float32 [windows, scored]: from the dense model in nats; loss: of the next token
Nothing is evicted after the prompt.
"""

import json
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import kvpress
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

PRESSES = {
    "streaming": lambda ratio: kvpress.StreamingLLMPress(ratio),
    "knorm": lambda ratio: kvpress.KnormPress(ratio),
    "tova": lambda ratio: kvpress.TOVAPress(ratio),
    "snapkv": lambda ratio: kvpress.SnapKVPress(ratio),
    "pyramidkv": lambda ratio: kvpress.PyramidKVPress(ratio),
    "adakv": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "expected_attention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
    "kvzip": lambda ratio: kvpress.KVzipPress(ratio),
    "think": lambda ratio: kvpress.ThinKPress(ratio),
}


def names(k):
    """A number for every key [1, heads, n, dim], from the bits of its first channels: int64 [heads, n]."""
    return k[0, :, :, :2].float().contiguous().view(torch.int64)[..., 0]


def kept_tokens(module, whole, now):
    """Which tokens of keys `whole` a layer still attends to, bool [heads, n]; now: the keys that the cache holds."""
    masked = getattr(module, "masked_key_indices", None)
    if masked is not None:  # presses whose heads differ hide tokens and hold them
        kept = torch.ones(whole.shape[1:3], dtype=torch.bool)
        kept[masked[1], masked[2]] = False
        return kept
    return torch.stack([torch.isin(a, b) for a, b in zip(names(whole), names(now), strict=True)])


@contextmanager
def noting(press):
    """The scores that a press gives in here, a tensor [kv_heads, n] a layer."""
    scores, inner = [], getattr(press, "press", press)

    def score(*args):
        found = asked(*args)
        scores.append(found[0].float().clone())
        return found

    def compress_post(*args):  # where KVzip's are complete, and not yet changed
        scores.extend(inner.score_val[:, 0].float().clone())
        return asked(*args)

    told = {"score": score, "compress_post": compress_post}
    name = next((name for name in told if hasattr(inner, name)), None)
    if name is None:
        yield scores
        return
    asked = getattr(inner, name)
    with patch.object(inner, name, told[name]):
        yield scores


@torch.no_grad()
def read(model, ids, press=None):
    """A cache that has read ids [1, n], and what a press noted."""
    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None  # of the press before
    with noting(press) as scores, press(model) if press else nullcontext():
        model.model(input_ids=ids, past_key_values=cache)
    return cache, scores


def kept(model, press, whole, cache):
    """What stays, bool [layers, kv_heads, n]; whole: the keys [1, kv_heads, n, dim] of each layer before."""
    if isinstance(press, kvpress.ThinKPress):
        return torch.stack([layer.keys[0].abs().amax(1) > 0 for layer in cache.layers])
    modules = [layer.self_attn for layer in model.model.layers]
    return torch.stack([kept_tokens(*x) for x in zip(modules, whole, (y.keys for y in cache.layers), strict=True)])


@torch.no_grad()
def follow(model, cache, start, ids):
    """log p [n, vocabulary] after each of ids [1, n], which come at position `start`.

    All at once, as kvpress's pipeline feeds a question; token by token where layers differ in length, which a mask is
    made for the first of, or where hidden keys have to be found for every query.
    """
    lengths = {layer.keys.shape[2] for layer in cache.layers}
    hidden = any(getattr(layer.self_attn, "masked_key_indices", None) is not None for layer in model.model.layers)
    told, step = [], 1 if hidden or len(lengths) > 1 else ids.shape[1]
    for at in range(0, ids.shape[1], step):
        positions = torch.arange(start + at, start + at + step)[None]
        logits = model(ids[:, at : at + step], past_key_values=cache, position_ids=positions).logits
        told.append(logits[0].float().log_softmax(-1))
    return torch.cat(told)


def main(folder):
    disable_progress_bar()
    job = json.loads((folder / "job.json").read_text())
    prompts = load_file(folder / "prompts.safetensors")["ids"]
    context, scored = job["context"], job["scored"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    with TemporaryDirectory() as plain:
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        tokenizer.chat_template = None  # KVzipPress would take the template's first tokens for no part of the text
        tokenizer.save_pretrained(plain)
        model.config.name_or_path = plain
        exact = []
        for ids in prompts[:, None]:
            cache, _ = read(model, ids[:, :context])
            keys = [layer.keys for layer in cache.layers]
            exact.append((keys, follow(model, cache, context, ids[:, context : context + scored])))
        for name, ratio in job["presses"]:
            path = folder / f"{name}-{ratio:g}.safetensors"
            if path.exists():
                continue
            found = {"kept": [], "score": [], "kl": [], "loss": []}
            for ids, (keys, dense) in zip(prompts[:, None], exact, strict=True):
                press = PRESSES[name](ratio)
                cache, scores = read(model, ids[:, :context], press)
                stays = kept(model, press, keys, cache)
                told = follow(model, cache, context, ids[:, context : context + scored])
                found["kept"].append(stays)
                found["score"].append(torch.stack(scores) if scores else torch.full(stays.shape, float("nan")))
                found["kl"].append((dense.exp() * (dense - told)).sum(-1))
                found["loss"].append(-told.gather(-1, ids[0, context + 1 : context + scored + 1, None])[:, 0])
            save_file({key: torch.stack(rows) for key, rows in found.items()}, path)
            print(f"{name} {ratio:g}: KL {torch.stack(found['kl']).mean():.4f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
