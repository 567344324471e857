"""The frame's traps: masks, padding, wrong use, bytes."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import longwave
from longwave.frame import storage_bytes
from longwave.frame.attention import NAME, Handle, LogicalLength, StepMask, _mask_over
from tests.conftest import build, into, left_padded, tokens
from tests.explicit import Explicit

PAGES = Explicit(keep=0.0, states=4, segment=8, sinks=2, window=8)


def run(model, ids, memory, mask=None, **options):
    with torch.no_grad():
        return model(ids, **into(memory), attention_mask=mask, use_cache=True, **options).logits


@pytest.fixture(params=["dense", PAGES], ids=["dense", "pages"])
def memory(request, llama):
    return longwave.cache(llama, request.param)


# our functions leave other caches alone


@pytest.mark.parametrize(
    "make", [lambda c: None, lambda c: DynamicCache(config=c), lambda c: StaticCache(config=c, max_cache_len=128)]
)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_other_caches_keep_working(models, make, kind):
    ours, stock = models[kind]
    longwave.cache(ours, "dense")
    assert ours.config._attn_implementation == NAME
    ids, mask = left_padded(2, 40, [7, 0])
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    cache = lambda m: {} if make(m.config) is None else into(make(m.config))  # noqa: E731
    assert torch.equal(ours.generate(ids, **options, **cache(ours)), stock.generate(ids, **options, **cache(stock)))
    chunk = tokens(2, 9, seed=4)
    if make(ours.config) is not None:  # several tokens on a filled cache: a None mask would cut K and V short
        a, b = make(ours.config), make(stock.config)
        run(ours, ids, a), run(stock, ids, b)
        torch.testing.assert_close(run(ours, chunk, a), run(stock, chunk, b))


def test_training_still_works(llama):
    longwave.cache(llama, "dense")
    model = copy.deepcopy(llama).train()
    ids = tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        model(ids, **into(longwave.cache(model, "dense")))


def test_no_graph_is_kept(llama, memory):
    """Forgetting torch.no_grad() must not make the cache hold the activations of every pass."""
    llama(tokens(1, 40), **into(memory))
    llama(tokens(1, 1), **into(memory))
    assert not any(x.requires_grad for layer in memory.memory_layers() for part in layer.parts().values() for x in part)


def test_mask_function_marks_only_its_own_caches():
    for origin in ("sdpa", "eager"):
        mask = _mask_over(origin)
        assert isinstance(mask(1, 3, LogicalLength(5), 2), StepMask)
        assert torch.is_tensor(mask(1, 3, 5, 2))
        with pytest.raises(ValueError, match=r"attention mask is \[1, 3\].*\[1, 5\]"):
            mask(1, 3, LogicalLength(5), 2, attention_mask=torch.ones(1, 3, dtype=torch.bool))


# masks


def test_padded_rows_need_their_mask_again(llama, memory):
    ids, mask = left_padded(2, 40, [9, 0])
    run(llama, ids, memory, mask)
    with pytest.raises(ValueError, match="holds padded rows: pass the attention mask"):
        run(llama, tokens(2, 1), memory)


def test_a_stored_token_cannot_be_hidden_later(llama, memory):
    ids = tokens(2, 40)
    run(llama, ids, memory)
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="a stored token stays as it was"):
        run(llama, tokens(2, 1), memory, mask)


def test_a_refused_mask_loses_nothing(models, llama, memory):
    stock = models["llama"][1]
    ids, new = tokens(2, 40), tokens(2, 1, seed=3)
    run(llama, ids, memory)
    wrong = torch.ones(2, 41, dtype=torch.long)
    wrong[0, 5] = 0
    with pytest.raises(ValueError, match="stays as it was"):
        run(llama, new, memory, wrong)
    with pytest.raises(ValueError, match="attention mask is"):
        run(llama, new, memory, torch.ones(2, 1, dtype=torch.long))
    assert memory.get_seq_length() == 40
    if memory.method.method == longwave.Dense():
        expected = run(stock, torch.cat([ids, new], 1), None)[:, -1:]
        torch.testing.assert_close(run(llama, new, memory), expected, rtol=1e-4, atol=1e-4)
    else:
        run(llama, new, memory)


def test_right_padding(models, llama):
    """Unusual, but transformers allows it: padding at the right, then more tokens."""
    stock = models["llama"][1]
    ids, new = tokens(2, 30), tokens(2, 5, seed=3)
    mask = torch.ones(2, 35, dtype=torch.long)
    mask[0, 22:30] = 0
    memory, plain = longwave.cache(llama, "dense"), DynamicCache(config=stock.config)
    for model, cache in ((llama, memory), (stock, plain)):
        run(model, ids, cache, mask[:, :30])
    torch.testing.assert_close(run(llama, new, memory, mask), run(stock, new, plain, mask), rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="padding in the middle"):
        memory.crop(-9)
    memory.crop(-3)
    assert memory.layers[0].rows == [24, 32]


def test_rows_of_padding_only_give_finite_numbers(llama, memory):
    ids, mask = left_padded(2, 40, [40, 0])
    assert torch.isfinite(run(llama, ids, memory, mask)).all()
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)
    assert torch.isfinite(run(llama, tokens(2, 6), memory, mask)).all()
    assert memory.layers[0].rows == [6, 46]


def test_own_4d_masks(models, llama):
    stock = models["llama"][1]
    ids, new = tokens(1, 20), tokens(1, 4, seed=2)
    block = torch.ones(1, 1, 4, 24, dtype=torch.bool)
    block[..., 3:9] = False
    memory, plain = longwave.cache(llama, "dense"), DynamicCache(config=stock.config)
    run(llama, ids, memory), run(stock, ids, plain)
    torch.testing.assert_close(run(llama, new, memory, block), run(stock, new, plain, block), rtol=1e-4, atol=1e-4)
    compressed = longwave.cache(llama, PAGES)
    run(llama, ids, compressed)
    with pytest.raises(NotImplementedError, match=r"4D attention mask counts tokens.*pass a 2D mask"):
        run(llama, new, compressed, block)


# wrong use


def test_another_batch_size(llama, memory):
    run(llama, tokens(2, 30), memory)
    with pytest.raises(ValueError, match=r"holds a batch of 2 but got 3 rows.*batch_repeat_interleave"):
        run(llama, tokens(3, 4), memory)
    assert memory.get_seq_length() == 30
    run(llama, tokens(2, 4), memory)  # nothing was lost
    prefilled = longwave.cache(llama, "dense")
    ids = tokens(1, 20)
    run(llama, ids[:, :19], prefilled)
    with pytest.raises(ValueError, match="batch of 1 but got 2"):
        llama.generate(ids, **into(prefilled), num_beams=2, max_new_tokens=3)


def test_one_prompt_many_samples(llama, memory):
    ids = tokens(1, 40)
    run(llama, ids[:, :39], memory)
    memory.batch_repeat_interleave(3)
    out = llama.generate(ids.repeat(3, 1), **into(memory), max_new_tokens=4, do_sample=True)
    assert out.shape == (3, 44)


def test_empty_prompt(llama, memory):
    with pytest.raises(ValueError, match="prompt is empty"):
        run(llama, tokens(1, 0), memory)


def test_nan(memory):
    model = build("llama")
    longwave.cache(model, "dense")
    model.model.layers[1].self_attn.v_proj.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="layer 1 got NaN or infinite values"):
        run(model, tokens(1, 20), memory)
    with pytest.raises(ValueError, match="reset"):  # layer 0 has the tokens, layer 1 does not
        run(model, tokens(1, 1), memory)
    memory.reset()
    run(build_with_our_attention(), tokens(1, 20), memory)


def build_with_our_attention():
    model = build("llama")
    longwave.cache(model, "dense")
    return model


@pytest.mark.parametrize("where", [0, 3, 5])
def test_a_failed_pass_is_never_continued(models, where):
    """Sliding layers have the tokens before the full layer refuses them: the next pass must not go on as if nothing."""
    model = copy.deepcopy(models["gemma3"][0])
    memory = longwave.cache(model, "dense")
    run(model, tokens(1, 40), memory)
    hook = model.model.layers[where].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, tokens(1, 1), memory)
    hook.remove()
    if where < 5:
        with pytest.raises(ValueError, match="failed half-way"):
            run(model, tokens(1, 1), memory)
    memory.reset()
    run(model, tokens(1, 40), memory)


def test_a_refusal_after_sliding_layers_took_the_tokens(models):
    model = copy.deepcopy(models["gemma3"][0])
    memory = longwave.cache(model, "dense")
    run(model, tokens(2, 40), memory)
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="stays as it was"):
        run(model, tokens(2, 1), memory, mask)
    with pytest.raises(ValueError, match=r"failed half-way.*reset"):
        run(model, tokens(2, 1), memory)


def test_nan_in_padding_is_nobodys_business(memory):
    layer = memory.layers[0]
    k = torch.randn(2, 2, 5, 8)
    k[0, :, 0] = float("inf")
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0, 0] = False
    layer.write(k, k.clone(), valid)
    layer.settle()
    assert torch.isfinite(layer.materialize()[0]).all()
    with pytest.raises(ValueError, match="NaN or infinite keys"):
        layer.write(k, k.clone())


def test_attention_weights_are_refused(llama, memory):
    with pytest.raises(NotImplementedError, match="output_attentions"):
        run(llama, tokens(1, 8), memory, output_attentions=True)


@pytest.mark.parametrize("count", [1, 5])
def test_wrong_crops(llama, memory, count):
    run(llama, tokens(1, 12), memory)
    with pytest.raises(ValueError, match="0 or negative"):
        memory.crop(count)
    with pytest.raises(ValueError, match="cannot remove 13 tokens from a cache of 12"):
        memory.crop(-13)
    assert memory.get_seq_length() == 12


def test_unknown_method_and_option(llama):
    with pytest.raises(ValueError, match="did you mean 'fourier'"):
        longwave.cache(llama, "furier")
    with pytest.raises(ValueError, match="did you mean 'segment'"):
        longwave.cache(llama, "fourier", segmnt=3)
    with pytest.raises(ValueError, match="dense has no option 'window'"):
        longwave.cache(llama, "dense", window=3)
    with pytest.raises(TypeError, match="name or an instance"):
        longwave.cache(llama, 3)
    with pytest.raises(ValueError, match="options belong in the method instance"):
        longwave.cache(llama, longwave.Fourier(), window=9)


def test_an_assistant_changes_nothing(models):
    """It guesses, the model reads the guesses in one pass and takes some back."""
    ours, stock = models["llama"]
    helper = copy.deepcopy(stock)
    for parameter in helper.parameters():  # nearly the same, so that some guesses are wrong
        parameter.data += 0.02 * parameter.abs().mean() * torch.randn(parameter.shape, generator=torch.manual_seed(1))
    about = helper.generation_config
    about.num_assistant_tokens, about.num_assistant_tokens_schedule = 5, "constant"
    about.assistant_confidence_threshold = 0.0
    memory, given = longwave.cache(ours, "dense"), dict(max_new_tokens=24, do_sample=False)
    out = ours.generate(tokens(1, 60), assistant_model=helper, **into(memory), **given)
    assert torch.equal(out, stock.generate(tokens(1, 60), **given))
    assert 83 <= memory.get_seq_length() <= 84


# bytes


def test_bytes_are_those_of_storages(llama, memory):
    llama.generate(tokens(3, 50), **into(memory), max_new_tokens=30, do_sample=False)
    report = memory.report()
    everything = [x for layer in memory.memory_layers() for part in layer.parts().values() for x in part]
    assert report.nbytes == memory.nbytes == storage_bytes(everything)
    assert storage_bytes([everything[0][:, :, :1]]) == storage_bytes([everything[0]])  # a view counts as what it pins
    assert report.dense_nbytes == 3 * 3 * 2 * 79 * 2 * 8 * 4
    stock = DynamicCache(config=llama.config)
    llama.generate(tokens(3, 50), **into(stock), max_new_tokens=30, do_sample=False)
    assert report.dense_nbytes == sum(x.nbytes for layer in stock.layers for x in (layer.keys, layer.values))
    assert report.ratio == report.nbytes / report.dense_nbytes


def test_sliding_layers_are_counted(models):
    model = models["gemma3"][0]
    memory = longwave.cache(model, PAGES)
    model.generate(tokens(1, 300), **into(memory), max_new_tokens=5, do_sample=False)
    kinds = [type(layer).__name__ for layer in memory.layers]
    assert kinds.count("SegmentedLayer") == 1
    assert kinds.count("DynamicSlidingWindowLayer") == 5
    parts = memory.report().parts
    assert parts["other layers"] >= 5 * 2 * 2 * 15 * 8 * 4
    assert memory.nbytes < memory.dense_nbytes


def test_dense_holds_little_more_than_dense(llama):
    memory = longwave.cache(llama, "dense")
    llama.generate(tokens(2, 130), **into(memory), max_new_tokens=100, do_sample=False)
    assert 1 <= memory.report().ratio < 1.13


def test_only_one_layer_is_dense_at_a_time(llama):
    """A prompt is compressed layer by layer: while layer 2 reads it, layers 0 and 1 are small already."""
    memory = longwave.cache(llama, Explicit(keep=0.0, states=1, segment=16, sinks=2, window=8))
    sizes = []

    def look(module, args, kwargs):
        sizes.append([layer.nbytes for layer in memory.memory_layers()])

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in llama.model.layers]
    run(llama, tokens(1, 400), memory)
    for hook in hooks:
        hook.remove()
    whole = 400 * 2 * 2 * 8 * 4
    assert sizes[2][0] < whole / 4
    assert sizes[2][1] < whole / 4


def test_handles_are_all_that_attention_gets(llama, memory):
    key, value = memory.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0)
    assert isinstance(key, Handle)
    assert key is value
    assert key.to("cpu") is key
    k, _ = memory.layers[0].materialize()  # tokens whose attention was never asked are stored all the same
    assert k.shape == (1, 2, 5, 8)
