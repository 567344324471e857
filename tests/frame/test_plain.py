"""4D masks that say no more than a 2D one, and those that do."""

import copy

import pytest
import torch
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration

import longwave
from longwave.frame import cache_argument, plain
from longwave.frame.plain import padding_of
from tests.conftest import SMALL, left_padded, tokens
from tests.matrix import LOSSY

LOWEST = torch.finfo(torch.float32).min


def written(real, new):
    """The bool mask of the last `new` columns, as said in words."""
    rows, columns = real.shape
    mask = torch.zeros(rows, 1, new, columns, dtype=torch.bool)
    for row in range(rows):
        for i in range(new):
            for column in range(columns - new + i + 1):
                mask[row, 0, i, column] = real[row, column]
    return mask


def added(mask, lowest=LOWEST):
    return torch.zeros(mask.shape).masked_fill(~mask, lowest)


@pytest.mark.parametrize("block", [1, 40, 1 << 24])
@pytest.mark.parametrize("new", [1, 5, 12])
def test_padding_is_read_off(monkeypatch, new, block):
    monkeypatch.setattr(plain, "BLOCK", block)
    real = torch.ones(3, 12, dtype=torch.bool)
    real[0, :4], real[1, 6], real[2, -1:] = False, False, new == 1
    mask = written(real, new)
    for given in (mask, added(mask), added(mask, float("-inf")), mask.expand(-1, 4, -1, -1)):
        assert torch.equal(padding_of(given, 3, new, 12), real)
    assert torch.equal(padding_of(torch.cat([mask, mask], -1), 3, new, 12), real)  # columns that are not there yet
    whole = written(torch.ones(1, 12, dtype=torch.bool), new)
    assert padding_of(whole, 3, new, 12).all()  # one for all rows


@pytest.mark.parametrize("block", [1, 1 << 24])
def test_what_says_more_is_told_apart(monkeypatch, block):
    monkeypatch.setattr(plain, "BLOCK", block)
    mask = written(torch.ones(2, 9, dtype=torch.bool), 9)
    assert padding_of(mask, 2, 9, 9) is not None
    for row, i, column in (
        (1, 2, 5),
        (0, 8, 3),
        (1, 4, 4),
    ):  # an image's block, something forgotten, one blind to itself
        other = mask.clone()
        other[row, 0, i, column] ^= True
        assert padding_of(other, 2, 9, 9) is None
        assert padding_of(added(other), 2, 9, 9) is None
        heads = mask.repeat(1, 4, 1, 1)
        heads[row, 2, i, column] ^= True
        assert padding_of(heads, 2, 9, 9) is None
    biased = added(mask)
    biased[0, 0, 5, 5] = -0.5
    assert padding_of(biased, 2, 9, 9) is None
    for column in (3, slice(None)):  # raised or lowered for every query: shown, and no padding
        biased = added(mask)
        biased[..., column] -= 0.5
        assert padding_of(biased, 2, 9, 9) is None
    for wrong in (mask[0], mask[..., :8], mask.long(), mask[:, :, :8]):
        assert padding_of(wrong, 2, 9, 9) is None
    assert padding_of(mask, 3, 9, 9) is None


@pytest.fixture(scope="module")
def gemma():
    """(model under test, untouched twin): one that makes a 4D mask whenever it is told what is text."""
    torch.manual_seed(0)
    text = {**SMALL, "num_hidden_layers": 6, "sliding_window": 16}
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    image = dict(mm_tokens_per_image=4, image_token_id=96, boi_token_id=95, eoi_token_id=94)
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 7}, **image)
    stock = Gemma3ForConditionalGeneration(config).eval()
    for name, parameter in stock.named_parameters():
        if "language_model" in name and "proj" in name:
            parameter.data *= 40
    return copy.deepcopy(stock), stock


def turns(model, cache, ids, mask, **kinds):
    """Tokens of two turns."""
    for more in (tokens(2, 9, seed=7), None):
        given = {"attention_mask": mask, **{name: torch.zeros_like(ids) for name in kinds}}
        ids = model.generate(ids, **given, **cache_argument(model, cache), max_new_tokens=6, do_sample=False)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
        if more is not None:
            ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    return ids


def test_text_for_a_model_that_reads_images(gemma):
    model, stock = gemma
    ids, mask = left_padded(2, 70, [9, 0])
    memory = longwave.cache(model, "dense")
    got = turns(model, memory, ids, mask, token_type_ids=True)
    assert torch.equal(got, turns(stock, DynamicCache(config=stock.config.text_config), ids, mask, token_type_ids=True))
    assert [layer.rows for layer in memory.memory_layers()] == [[81, 90]]  # padding is not stored: it was understood


@pytest.mark.parametrize("method", ["kivi", "fourier", "snapkv", "h2o", "quest"])
def test_compressed_as_without_the_mask(gemma, method):
    model, _ = gemma
    ids, mask = left_padded(2, 70, [9, 0])
    memories = [LOSSY[method](model) for _ in range(2)]
    given = turns(model, memories[0], ids, mask, token_type_ids=True)
    assert torch.equal(given, turns(model, memories[1], ids, mask))
    assert memories[0].report() == memories[1].report()


def test_a_mask_is_looked_at_once_a_pass(llama, monkeypatch):
    looked = []
    monkeypatch.setattr("longwave.frame.counting.padding_of", lambda *given: looked.append(1) or padding_of(*given))
    memory = longwave.cache(llama, "dense")
    with torch.no_grad():
        for new, whole in ((20, 20), (5, 25)):
            mask = written(torch.ones(1, whole, dtype=torch.bool), new)
            llama(tokens(1, new), attention_mask=mask, **cache_argument(llama, memory), use_cache=True)
            mask[...] = True  # nobody holds on to it
    assert len(looked) == 2
    assert memory._progress.mask is None


@torch.no_grad()
def test_a_mask_that_hides_what_is_stored_is_more_than_padding(models):
    """Stored tokens stay as they were, but a dense layer can leave some out of a pass."""
    ours, stock = models["llama"]
    caches = [longwave.cache(ours, "dense"), DynamicCache(config=stock.config)]
    hides = torch.ones(1, 34, dtype=torch.bool)
    hides[0, 3:9] = False
    found = []
    for model, cache in zip((ours, stock), caches, strict=True):
        for ids, mask in ((tokens(1, 30), None), (tokens(1, 4, 2), written(hides, 4)), (tokens(1, 4, 3), None)):
            out = model(ids, attention_mask=mask, **cache_argument(model, cache), use_cache=True)
        found.append(out.logits)
    torch.testing.assert_close(*found)
