"""What is checked of a model: that a cache is refused for the right reason, or works. Each check raises where not."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    DynamicCache,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import longwave
from longwave.plan.calibrate import calibrate
from tests.conftest import into
from tests.models.table import BASE, VOCABULARY, Row

LENGTH, LONG, CUT, STEPS = 40, 240, 27, 3
AUTO = {"t5": AutoModelForSeq2SeqLM, "gemma3": AutoModelForImageTextToText, "qwen2_5_vl": AutoModelForImageTextToText}


def config_of(row: Row):
    return AutoConfig.for_model(row.kind, **(row.config if row.whole else BASE | row.config))


def build(row: Row):
    torch.manual_seed(0)
    model = AUTO.get(row.kind, AutoModelForCausalLM).from_config(config_of(row)).eval()
    for name, parameter in model.named_parameters():
        if not parameter.any():  # what learns to look at images starts from nothing
            torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, mean=2.0)
        elif parameter.ndim > 1 and "embed" not in name:  # at the usual scale a random model hardly attends
            parameter.data *= 4
    return model


def tokens(batch: int, length: int):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model, memory, ids, sizes, mask=None, **first):
    """Of passes of so many tokens; `first` goes with the first of them."""
    found, end = [], 0
    for size in sizes:
        new = ids[:, end : end + size]
        end += size
        given = dict(first, use_cache=True, **into(memory))
        if mask is not None:
            given |= dict(
                attention_mask=mask[:, :end], position_ids=(mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, -size:]
            )
        with torch.no_grad():
            found.append(model(new, **given).logits)
        first = {}
    return torch.cat(found, 1)


def close(got, want):
    assert float((got - want).abs().max()) <= 1e-4 * float(want.std()), float((got - want).abs().max() / want.std())


def differ(got, want):
    assert float((got - want).abs().max()) > 1e-3 * float(want.std())


def refused(row: Row) -> str:
    """The error that building a cache gives. The model attends and answers as before."""
    model, ids = build(row), tokens(1, 12)
    config = model.config.get_text_config(decoder=True)
    attends = config._attn_implementation
    before = model.generate(ids, max_new_tokens=3, do_sample=False)
    with pytest.raises(NotImplementedError) as error:
        longwave.cache(model, "dense")
    assert config._attn_implementation == attends
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), before)
    return str(error.value)


def identity(model, stock):
    """A dense cache gives stock's logits, of a prompt and of steps, and what came before counts."""
    ids, sizes = tokens(2, LENGTH + STEPS), (LENGTH, *[1] * STEPS)
    want = logits(stock, DynamicCache(config=stock.config), ids, sizes)
    close(logits(model, longwave.cache(model, "dense"), ids, sizes), want)
    other = torch.cat([ids[:, :1].flip(0) + 1, ids[:, 1:]], 1) % VOCABULARY
    differ(logits(stock, DynamicCache(config=stock.config), other, sizes)[:, LENGTH:], want[:, LENGTH:])


def smaller(model):
    """A cache that loses something: in pages, and of whole tokens where the heads do not fit pages."""
    if model.config.get_text_config(decoder=True).to_dict().get("head_dim", 8) % 8:
        for method in ("fourier", "kivi"):
            with pytest.raises(
                NotImplementedError, match="heads have 12 channels, and pages hold multiples of 8: take"
            ):
                longwave.cache(model, method, budget=0.25)
        return longwave.cache(model, "streaming", budget=0.25, sinks=2, window=8)
    return longwave.cache(model, "fourier", budget=0.25, plan="safe", segment=8, sinks=2, window=8)


def compression(model):
    """Bytes really fall, and the answers are numbers, though not stock's."""
    ids, sizes = tokens(1, LONG + STEPS), (LONG, *[1] * STEPS)
    dense, memory = longwave.cache(model, "dense"), smaller(model)
    want, got = (logits(model, cache, ids, sizes) for cache in (dense, memory))
    close(got[:, :LONG], want[:, :LONG])
    assert torch.isfinite(got).all()
    assert not torch.equal(got[:, LONG:], want[:, LONG:])
    report = memory.report()
    others = report.parts.get("other layers", 0)
    assert report.nbytes - others < 0.6 * (report.dense_nbytes - others)


def chunks(model, stock, longrope=""):
    """A prompt in two calls gives what it gives in one; where another rotation begins in between it is refused."""
    ids, two = tokens(2, LENGTH), (CUT, LENGTH - CUT)
    if longrope:
        with pytest.raises(ValueError, match=r"rotates all of them otherwise \(longrope\)"):
            logits(model, longwave.cache(model, "dense"), ids, two)
        return
    got = logits(model, longwave.cache(model, "dense"), ids, two)
    close(got, logits(stock, DynamicCache(config=stock.config), ids, (LENGTH,)))


def padding(model):
    """A padded row is the row alone, in the prompt and in steps."""
    ids, mask, pads = tokens(2, LENGTH + STEPS), torch.ones(2, LENGTH + STEPS, dtype=torch.long), 7
    ids[0, :pads], mask[0, :pads] = 0, 0
    both = logits(model, longwave.cache(model, "dense"), ids, (LENGTH, *[1] * STEPS), mask)
    alone = logits(model, longwave.cache(model, "dense"), ids[:1, pads:], (LENGTH - pads, *[1] * STEPS))
    close(both[:1, pads:], alone)


class Characters:
    """A tokenizer of one id a character."""

    def __call__(self, text, return_tensors=None, **options):
        ids = [3 + ord(letter) % (VOCABULARY - 3) for letter in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)


def calibration(model):
    """What its heads can spare is measured, and plans are made of it."""
    method = longwave.Fourier(segment=16, sinks=2, window=16)
    text = ["the river rose all night and fell by day; " * 20]
    profile = calibrate(model, Characters(), text, method, tokens=160, windows=1, scored=16, probes=2)
    for side in ("k", "v"):
        costs = profile.sensitivity.costs(side)
        assert torch.isfinite(costs).all()
        assert (costs[..., 0] > 0).any()
    assert longwave.cache(model, method, 0.1, profile=profile).method.profile == profile.digest


def promised(model):
    """What a method promises is what is held, to the byte, but for sliding layers: there at most."""
    memory = smaller(model)
    for length in (5, LENGTH, LONG):
        memory.reset()
        logits(model, memory, tokens(2, length), (length,))
        others = memory.report().parts.get("other layers", 0)
        sliding = 2 * memory.method.shape.sliding_bytes(length)
        assert memory.nbytes - others == memory.method.nbytes(length, 2) - sliding
        if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in memory.layers):
            assert others <= sliding <= 1.3 * others + 1000


def image(model):
    """What a prompt with an image of four tokens has beside its ids, and where those are."""
    ids = tokens(1, LENGTH + STEPS)
    ids[:, 3:7] = model.config.image_token_id
    generator = torch.Generator().manual_seed(2)
    if hasattr(model.config, "mm_tokens_per_image"):
        types = (ids[:, :LENGTH] == model.config.image_token_id).long()
        return ids, dict(pixel_values=torch.randn(1, 3, 28, 28, generator=generator), token_type_ids=types)
    grid = torch.tensor([[1, 4, 4]])
    return ids, dict(pixel_values=torch.randn(16, 3 * 2 * 14 * 14, generator=generator), image_grid_thw=grid)


def images(model, stock):
    """An image in the prompt: a dense cache gives stock's logits, and a smaller one numbers, after the same prompt."""
    ids, first = image(model)
    sizes = (LENGTH, *[1] * STEPS)
    want = logits(stock, DynamicCache(config=stock.config), ids, sizes, **first)
    close(logits(model, longwave.cache(model, "dense"), ids, sizes, **first), want)
    blind = dict(first, pixel_values=-first["pixel_values"])
    differ(logits(stock, DynamicCache(config=stock.config), ids, sizes, **blind)[:, LENGTH:], want[:, LENGTH:])
    small = smaller(model)
    got = logits(model, small, ids, sizes, **first)
    close(got[:, :LENGTH], want[:, :LENGTH])
    assert torch.isfinite(got).all()


def works(row: Row):
    """Every check that a supported model has to pass."""
    model = build(row)
    stock = copy.deepcopy(model)
    identity(model, stock)
    compression(model)
    chunks(model, stock, row.but)
    padding(model)
    promised(model)
    if not row.unpaged:
        calibration(model)
    if hasattr(model.config, "image_token_id"):
        images(model, stock)
