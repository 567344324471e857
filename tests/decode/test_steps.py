"""Steps over reserved storage: the same tokens, and the same cache afterwards, as transformers' own loop gives."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TextStreamer,
)

import longwave
from longwave.decode import StaticDecoder, Unsupported, supports
from longwave.ops.attention.reference import dense_attention, step_attention
from longwave.store.pages import PageStore
from tests.conftest import SMALL, into, left_padded, merging_profile, random_profile, tokens
from tests.explicit import Explicit

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
NEW = 30
PADS = {"one": [0], "alike": [0, 0], "ragged": [0, 3, 11, 38]}  # of 40 columns: the last row has yet to fill a segment


def fourier(model):
    return longwave.cache(
        model, longwave.Fourier(segment=8, sinks=2, window=8), budget=0.4, profile=random_profile(model)
    )


def filled(model):
    """A cache that has read 40 tokens."""
    memory = fourier(model)
    with torch.no_grad():
        model(tokens(1, 40), **into(memory))
    return memory


MEMORIES = {
    "dense": lambda model: longwave.cache(model, "dense"),
    "fourier": fourier,
    "fourier-merged": lambda model: longwave.cache(
        model, longwave.Fourier(segment=8, sinks=2, window=8), budget=0.3, profile=merging_profile(model)
    ),
    "fourier-values": lambda model: longwave.cache(
        model, Explicit(keep=0.5, states=2, segment=8, sinks=2, window=8), profile=random_profile(model)
    ),
    "kivi": lambda model: longwave.cache(model, longwave.Kivi(bits=4, group=8, sinks=3, window=5)),
}


def both(model, make, pads=(0,), **options):
    """(tokens, cache) of transformers' loop and of ours."""
    ids, mask = left_padded(len(pads), 40, pads)
    found = []
    for loop in (model.generate, lambda *a, **k: longwave.generate(model, *a, **k)):
        memory = make(model)
        torch.manual_seed(5)
        given = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False) | options
        found.append((loop(ids, **into(memory), **given), memory))
    return found


def check_same(ours, theirs):
    """Two caches that read the same tokens: equal counts and bytes; numbers equal but for rounding."""
    assert ours.report() == theirs.report()
    for index, (a, b) in enumerate(zip(ours.memory_layers(), theirs.memory_layers(), strict=True)):
        for name in ("columns", "rows", "_run"):
            assert getattr(a, name) == getattr(b, name)
        assert a.dense.lengths == b.dense.lengths
        assert {t.dtype for t in a.dense.tensors()} == {t.dtype for t in b.dense.tensors()}
        held = getattr(a, "store", None)
        assert (held is None) == (getattr(b, "store", None) is None)
        if held is not None:
            assert held.counts == b.store.counts
            assert held.pages.shape == b.store.pages.shape
            if index == 0:  # its K and V come from the tokens alone
                assert torch.equal(held.pages, b.store.pages)
        for x, y in zip((*a.dense.tensors(), *a.materialize()), (*b.dense.tensors(), *b.materialize()), strict=True):
            close = torch.isclose(x, y, rtol=1e-4, atol=1e-4)  # where rounding moves a code, all of a step is off
            assert close.float().mean() > 0.99


@pytest.mark.parametrize("pads", PADS.values(), ids=PADS)
@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_greedy_is_transformers_own(llama, make, pads):
    (want, theirs), (got, ours) = both(llama, make, pads)
    assert torch.equal(got, want)
    check_same(ours, theirs)


def test_rows_cross_a_segment_in_different_steps(llama):
    ids, mask = left_padded(3, 40, [0, 3, 6])
    memory = fourier(llama)
    llama(ids, attention_mask=mask, **into(memory), position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    seen = []
    with StaticDecoder(llama, memory, new_tokens=20) as decoder:
        for _ in range(20):
            decoder.step(tokens(3, 1))
            seen.append(decoder._counts[0].tolist())
            assert decoder._at[0].tolist() == [
                n - 8 * c for n, c in zip(mask.sum(-1) + decoder.steps, seen[-1], strict=True)
            ]
    crossed = [[step for step in range(1, 20) if seen[step][row] > seen[step - 1][row]] for row in range(3)]
    assert all(len(steps) >= 2 for steps in crossed)
    assert len({tuple(steps) for steps in crossed}) == 3


@pytest.mark.parametrize("name", ["qwen3", "llama"])
@pytest.mark.parametrize("options", [dict(temperature=1.3), dict(top_k=7, top_p=0.8, repetition_penalty=1.2)])
def test_sampled_with_a_seed_is_transformers_own(models, name, options):
    (want, theirs), (got, ours) = both(models[name][0], fourier, [0, 5], do_sample=True, **options)
    assert torch.equal(got, want)
    check_same(ours, theirs)


def test_several_sequences_and_a_chunked_prompt(llama):
    (want, theirs), (got, ours) = both(llama, fourier, do_sample=True, num_return_sequences=3, prefill_chunk_size=16)
    assert got.shape[0] == 3
    assert torch.equal(got, want)
    check_same(ours, theirs)


@pytest.mark.parametrize("new", [1, 2])
def test_few_tokens(llama, new):
    (want, theirs), (got, ours) = both(llama, fourier, max_new_tokens=new)
    assert torch.equal(got, want)
    check_same(ours, theirs)


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_the_cache_goes_on(llama, make):
    (ids, theirs), (_, ours) = both(llama, make, [0, 9])
    mask = torch.cat([left_padded(2, 40, [0, 9])[1], torch.ones(2, NEW + 4, dtype=torch.long)], 1)
    ids = torch.cat([ids, tokens(2, 4, seed=9)], 1)
    more = [
        loop(ids, attention_mask=mask, **into(memory), max_new_tokens=12, do_sample=False)
        for loop, memory in [
            (llama.generate, theirs),
            (llama.generate, copy.deepcopy(ours)),
            (lambda *a, **k: longwave.generate(llama, *a, **k), ours),
        ]
    ]
    assert torch.equal(more[1], more[0])
    assert torch.equal(more[2], more[0])
    check_same(ours, theirs)
    for memory in (ours, theirs):
        memory.crop(-2)
        memory.batch_select_indices(torch.tensor([1]))
    check_same(ours, theirs)


def test_a_row_that_ends_goes_on_with_padding(llama):
    (free, _), _ = both(llama, fourier, [0, 5])
    end = free[1, 45].item()
    (want, theirs), (got, ours) = both(llama, fourier, [0, 5], eos_token_id=end, pad_token_id=0)
    assert torch.equal(got, want)
    assert (got[1, 46:] == 0).all()
    assert got.shape[1] > 46
    check_same(ours, theirs)
    (want, theirs), (got, ours) = both(llama, fourier, eos_token_id=free[0, 50].item(), pad_token_id=0)
    assert torch.equal(got, want)
    assert got.shape[1] < 40 + NEW  # ended before what was reserved
    check_same(ours, theirs)


def test_streamer(llama, tokenizer, capsys):
    texts = []
    for loop in (llama.generate, lambda *a, **k: longwave.generate(llama, *a, **k)):
        loop(
            tokens(1, 40),
            **into(fourier(llama)),
            max_new_tokens=NEW,
            do_sample=False,
            streamer=TextStreamer(tokenizer),
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("place", ["argument", "config", "model"])
def test_stop_strings(llama, tokenizer, monkeypatch, place):
    (free, _), _ = both(llama, fourier)
    stop = [tokenizer.decode(free[0, 48:50])]
    if place == "model":
        monkeypatch.setattr(llama.generation_config, "stop_strings", stop)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, stop_strings=stop)
    options = {"argument": dict(stop_strings=stop), "config": dict(generation_config=config), "model": {}}[place]
    (want, theirs), (got, ours) = both(llama, fourier, tokenizer=tokenizer, **options)
    assert torch.equal(got, want)
    assert got.shape[1] <= 50
    check_same(ours, theirs)
    assert f"stop_strings={stop} need a tokenizer" in refusal(llama, fourier(llama), **options)


def test_stop_strings_of_the_model_can_be_turned_off(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(llama.generation_config, "stop_strings", [tokenizer.decode(tokens(1, 40)[0, 4:5])])
    (want, _), (got, _) = both(llama, fourier, stop_strings=None)
    assert torch.equal(got, want)


def test_a_model_that_makes_its_mask_of_the_length_of_the_past():
    torch.manual_seed(0)
    model = BioGptForCausalLM(BioGptConfig(**{**SMALL, "num_key_value_heads": 4}, num_hidden_layers=2)).eval()
    for parameter in model.parameters():
        parameter.data *= 20 if parameter.ndim == 2 else 1  # or it repeats one token
    (want, theirs), (got, ours) = both(model, MEMORIES["dense"], [0, 5])
    assert len(set(want[:, 40:].flatten().tolist())) > 2
    assert torch.equal(got, want)
    check_same(ours, theirs)


def test_scores_and_logits(llama):
    (want, _), (got, ours) = both(
        llama,
        fourier,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        temperature=0.7,
        do_sample=True,
    )
    assert torch.equal(got.sequences, want.sequences)
    assert getattr(got, "cache", None) is ours or got.past_key_values is ours
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(getattr(got, name)), torch.stack(getattr(want, name)), rtol=0, atol=1e-3)


# steps one by one


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_steps_give_the_logits_of_the_model(llama, make):
    ids = tokens(2, 60)
    found, memories = [], []
    for stepped in (False, True):
        memory = make(llama)
        with torch.no_grad():
            llama(ids[:, :40], **into(memory))
            if stepped:
                with StaticDecoder(llama, memory, new_tokens=25) as decoder:
                    found.append(torch.stack([decoder.step(ids[:, i]).clone() for i in range(40, 60)]))
            else:
                steps = [llama(ids[:, i : i + 1], **into(memory)).logits[:, -1] for i in range(40, 60)]
                found.append(torch.stack(steps))
        memories.append(memory)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)
    check_same(*memories[::-1])


def test_made_up_content(llama):
    """A benchmark fills a cache without a prompt."""
    memory = fourier(llama)
    for layer in memory.memory_layers():
        layer.write(*torch.randn(2, 2, 2, 100, 8))
        layer.settle()
    with StaticDecoder(llama, memory, new_tokens=4) as decoder:
        assert decoder.positions.tolist() == [[100], [100]]
        assert decoder.step(torch.tensor([[3], [4]])).shape == (2, SMALL["vocab_size"])
    assert memory.get_seq_length() == 101


def test_storage_stays_and_is_not_held_twice(llama):
    memory = filled(llama)
    with StaticDecoder(llama, memory, new_tokens=40) as decoder:
        before, held = decoder._addresses(), memory.nbytes
        for _ in range(40):
            decoder.step(tokens(1, 1))
            assert memory.nbytes == held
        assert decoder._addresses() == before
        layer = next(memory.memory_layers())
        assert layer.dense.k.shape[2] == 64  # sinks, window and a segment, in blocks of 64
        assert layer.store.pages.shape[1] == layer.store.counts[0] == 8  # 80 - 2 - 8 tokens, by eights
    assert memory.get_seq_length() == 80


def test_a_lent_cache_refuses_other_hands(llama):
    memory = filled(llama)
    decoder = StaticDecoder(llama, memory, new_tokens=2)
    layer = next(memory.memory_layers())
    for use in (
        lambda: llama(tokens(1, 1), **into(memory)),
        lambda: memory.crop(-1),
        lambda: memory.batch_repeat_interleave(2),
        layer.materialize,
        layer.offload,
        layer.prefetch,
        lambda: layer.move("cpu"),
        lambda: layer.write(*torch.zeros(2, 1, 2, 1, 8)),
        lambda: copy.deepcopy(memory),
        lambda: copy.deepcopy(layer),
        lambda: pickle.dumps(memory),
    ):
        with pytest.raises(RuntimeError, match=r"finish\(\)"):
            use()
    decoder.step(tokens(1, 1))
    decoder.step(tokens(1, 1))
    with pytest.raises(RuntimeError, match="reserved for 2 steps"):
        decoder.step(tokens(1, 1))
    decoder.finish()
    decoder.finish()
    with pytest.raises(RuntimeError, match="handed its cache back"):
        decoder.step(tokens(1, 1))
    with torch.no_grad():
        llama(tokens(1, 1), **into(memory))
    assert memory.get_seq_length() == 43


def test_reset_takes_the_cache_back(llama):
    memory = filled(llama)
    with torch.no_grad():
        decoder = StaticDecoder(llama, memory, new_tokens=2)
        memory.reset()
        llama(tokens(2, 40), **into(memory))
        with StaticDecoder(llama, memory, new_tokens=2) as other:
            decoder.finish()  # not its cache any more
            other.step(tokens(2, 1))
    assert memory.get_seq_length() == 41


def test_a_dropped_decoder_hands_the_cache_back(llama):
    memories = [filled(llama) for _ in range(2)]
    decoder = StaticDecoder(llama, memories[0], new_tokens=9)
    for _ in range(9):
        decoder.step(tokens(1, 1))
    del decoder  # no cycle waits for the garbage collector
    with StaticDecoder(llama, memories[1], new_tokens=9) as decoder:
        for _ in range(9):
            decoder.step(tokens(1, 1))
    check_same(*memories)


def test_a_layer_that_cannot_be_released_does_not_keep_the_others(llama, monkeypatch):
    memory, twin = filled(llama), filled(llama)
    layers = list(memory.memory_layers())

    def fails():
        raise torch.OutOfMemoryError(f"layer {len(tried)}")

    tried = []
    for layer in layers[:2]:
        monkeypatch.setattr(layer, "release", lambda: tried.append(0) or fails())
    decoder = StaticDecoder(llama, memory, new_tokens=100)
    with pytest.raises(torch.OutOfMemoryError, match="layer 1"):
        decoder.finish()
    assert layers[2].nbytes == list(twin.memory_layers())[2].nbytes < layers[1].nbytes
    with torch.no_grad():
        llama(tokens(1, 1), **into(memory))


def cannot_capture(monkeypatch, error):
    def fails(decoder):
        raise error

    monkeypatch.setattr(StaticDecoder, "_capture", fails)
    monkeypatch.setattr(StaticDecoder, "captures", property(lambda _: True, lambda *_: None), raising=False)


def test_a_step_that_cannot_be_captured_says_how_to_go_on(llama, monkeypatch):
    cannot_capture(monkeypatch, RuntimeError("stream is capturing"))
    says = r"a step of LlamaForCausalLM \(stream is capturing\). graph=False"
    memory, ours = filled(llama), fourier(llama)
    with StaticDecoder(llama, memory, new_tokens=3) as decoder, pytest.raises(Unsupported, match=says):
        decoder.step(tokens(1, 1))
    with pytest.raises(Unsupported, match=rf"{says}(.|\n)*the cache holds what was read: cache.reset\(\)"):
        longwave.generate(llama, tokens(1, 40), **into(ours), max_new_tokens=3)
    check_same(memory, filled(llama))
    check_same(ours, memory)


@pytest.mark.parametrize("ending", [None, RuntimeError("capture_end")], ids=["ends", "ends in an error too"])
def test_a_capture_without_memory_is_not_blamed_on_the_model(llama, monkeypatch, ending):
    full = torch.OutOfMemoryError("no room")
    if ending:
        ending.__context__ = full
    cannot_capture(monkeypatch, ending or full)
    with pytest.raises(torch.OutOfMemoryError, match=r"^no room\n.*fewer rows, need less\n.*cache.reset\(\)"):
        longwave.generate(llama, tokens(1, 40), **into(fourier(llama)), max_new_tokens=3)


def test_storage_that_cannot_be_had_leaves_the_cache_as_it_was(llama, monkeypatch):
    memory = filled(llama)
    before = memory.report()
    last = list(memory.memory_layers())[-1]

    def fails(new):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(last, "reserve", fails)
    with pytest.raises(torch.OutOfMemoryError, match="fewer rows"):
        StaticDecoder(llama, memory, new_tokens=50)
    assert memory.report() == before
    with torch.no_grad():
        llama(tokens(1, 1), **into(memory))


def test_a_streamer_that_fails_leaves_a_good_cache(llama):
    class Broken:
        left = 12

        def put(self, value):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    memory = fourier(llama)
    with pytest.raises(KeyboardInterrupt):
        longwave.generate(llama, tokens(1, 40), **into(memory), max_new_tokens=NEW, streamer=Broken())
    assert memory.get_seq_length() == 50
    check_same(copy.deepcopy(memory), memory)


def test_numbers_that_overflow_are_refused(llama):
    memory = fourier(llama)
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model(tokens(1, 40), **into(memory))
        model.model.embed_tokens.weight[7] = float("nan")
        with StaticDecoder(model, memory, new_tokens=3) as decoder:
            with pytest.raises(ValueError, match="NaN or infinite keys"):
                decoder.step(torch.tensor([7]))
            decoder.step(torch.tensor([5]))
    assert memory.get_seq_length() == 41
    assert all(torch.isfinite(x).all() for layer in memory.memory_layers() for x in layer.materialize())


# what it refuses


def refusal(model, memory, **options):
    with pytest.raises(ValueError) as error:
        longwave.generate(model, tokens(1, 40), **dict(**into(memory), max_new_tokens=5) | options)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=2), "beam_search is not greedy or sampling"),
        (dict(prompt_lookup_num_tokens=3), "assisted_generation is not greedy"),
        (dict(output_hidden_states=True, return_dict_in_generate=True), "hidden states"),
        (dict(output_attentions=True, return_dict_in_generate=True), "attentions"),
        (dict(synced_gpus=True), "synced_gpus"),
        (dict(custom_generate="repo"), "custom_generate"),
        (dict(stop_strings=["a"]), "need a tokenizer"),
        (dict(token_healing=True), "token_healing rewrites"),
        (dict(generation_config=GenerationConfig(token_healing=True)), "token_healing rewrites"),
        (dict(graph=True), "graph=True needs CUDA"),
        (dict(**into(None)), "needs a cache"),
        (dict(**into(DynamicCache())), "DynamicCache"),
    ],
)
def test_refused_options(llama, options, message):
    assert message in refusal(llama, fourier(llama), **options)


def test_refused_models_and_caches(models):
    llama = models["llama"][0]
    paper = longwave.FourierPaper(keep=0.5, states=2, sinks=2, window=4)
    memory = longwave.cache(llama, paper, profile=random_profile(llama))
    assert "one period" in refusal(llama, memory)
    assert "model.generate works" in refusal(llama, memory)
    assert memory.get_seq_length() == 0  # before the prompt was read
    memory = fourier(llama)
    memory.activate_past_recording()
    assert "assisted decoding" in refusal(llama, memory)
    with pytest.raises(ValueError, match="empty"):
        StaticDecoder(llama, fourier(llama), new_tokens=1)
    dynamic = LlamaForCausalLM(
        LlamaConfig(**SMALL, num_hidden_layers=1, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))
    ).eval()
    assert "changes with the length" in supports(dynamic, longwave.cache(dynamic, "dense"))
    dynamic.train()
    assert "training mode" in supports(dynamic, longwave.cache(dynamic, "dense"))
    dynamic.set_attn_implementation("sdpa")
    memory = fourier(llama)
    assert 'attends by "sdpa"' in supports(dynamic, memory)


def test_a_byte_budget_is_checked_before_decoding(llama):
    method = longwave.Fourier(segment=8, sinks=2, window=8)
    memory = longwave.cache(llama, method, budget="100KB", profile=random_profile(llama), max_tokens=60)
    assert "40 with 21 new ones do not fit" in refusal(llama, memory, max_new_tokens=22)
    embedded = llama.get_input_embeddings()(tokens(1, 40))
    with pytest.raises(ValueError, match="40 with 21 new"):
        longwave.generate(llama, inputs_embeds=embedded, **into(memory), max_new_tokens=22)
    assert memory.get_seq_length() == 0  # before the prompt was read
    longwave.generate(llama, tokens(1, 40), **into(memory), max_new_tokens=21)
    assert memory.get_seq_length() == 60
    memory.reset()
    with torch.no_grad():
        llama(tokens(1, 20), **into(memory))
    mask = torch.ones(1, 40, dtype=torch.long)
    with pytest.raises(ValueError, match="40 with 21 new"):  # new ids alone, with a mask over everything
        longwave.generate(llama, tokens(1, 20), attention_mask=mask, **into(memory), max_new_tokens=22)
    assert memory.get_seq_length() == 20
    with pytest.raises(ValueError, match="20 with 41 new"):
        StaticDecoder(llama, memory, new_tokens=41)


def test_as_many_new_ids_as_the_cache_holds_are_no_repetition(llama):
    found, ids = [], tokens(1, 40)
    for loop in (llama.generate, lambda *a, **k: longwave.generate(llama, *a, **k)):
        memory = fourier(llama)
        with torch.no_grad():
            llama(ids[:, :20], **into(memory))
        given = dict(attention_mask=torch.ones_like(ids), **into(memory), max_new_tokens=5, do_sample=False)
        found.append(loop(ids[:, 20:], **given))
    assert torch.equal(*found)


# 16 bits and kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_step_attention_in_16_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 8, 1, 16, generator=generator).to(dtype)
    k, v = torch.randn(2, 3, 2, 700, 16, generator=generator).to(dtype)
    seen = torch.tensor([[1], [63], [700]], dtype=torch.int32)
    got = step_attention(q, k, v, 0.3, seen)
    want = dense_attention(q.double(), k.double(), v.double(), 0.3, seen)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3 if dtype == torch.float16 else 2e-2)


def small_half(dtype=torch.float16):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | dict(hidden_size=64, num_attention_heads=8, head_dim=32), num_hidden_layers=2)
    return LlamaForCausalLM(config).to(dtype).eval()


def steps(model, memory, ids, prompt, **options):
    """Logits of the steps after the prompt [steps, B, vocabulary]."""
    with torch.no_grad():
        model(ids[:, :prompt], **into(memory))
    with StaticDecoder(model, memory, new_tokens=ids.shape[1] - prompt, **options) as decoder:
        return torch.stack([decoder.step(ids[:, i]).clone() for i in range(prompt, ids.shape[1])]).float()


def halves(model, name):
    if name == "fourier":
        method = longwave.Fourier(segment=32, sinks=2, window=8)
        return longwave.cache(model, method, budget=0.3, profile=random_profile(model))
    if name == "kivi":
        return longwave.cache(model, "kivi", bits=2, group=32, sinks=2, window=8)
    return longwave.cache(model, name)


def test_a_prompt_that_is_in_the_cache_already_is_not_read_twice(llama):
    memory, ids = fourier(llama), tokens(1, 40)
    with torch.no_grad():
        llama(ids, **into(memory))
    with pytest.raises(ValueError, match="in the cache already"):
        longwave.generate(llama, ids, **into(memory), max_new_tokens=4)
    assert memory.get_seq_length() == 40


def test_a_graph_without_cuda_is_refused_before_the_prompt_is_read(llama):
    memory = fourier(llama)
    with pytest.raises(ValueError, match="needs CUDA"):
        longwave.generate(llama, tokens(1, 40), **into(memory), max_new_tokens=4, graph=True)
    assert memory.get_seq_length() == 0


@pytest.mark.parametrize("name", ["fourier", "kivi"])
def test_the_triton_kernel_answers_steps(monkeypatch, name):
    pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids, found, answers = small_half().to(device), tokens(2, 77).to(device), [], []
    fused = PageStore.attend

    def counted(self, *args):
        out = fused(self, *args)
        answers.append(out is not None)
        return out

    monkeypatch.setattr(PageStore, "attend", counted)
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("LONGWAVE_KERNELS", kernels)
        answers.clear()
        found.append(steps(model, halves(model, name), ids, 72, graph=False))
        assert answers == [kernels == "triton"] * 2 * 5  # two layers, five steps; the second one compresses
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=4e-3)


class Recorded(TorchDispatchMode):
    """A CUDA graph played on a CPU: operations with the tensors and numbers of once, results where they once lay."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func._overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "lift_fresh"), func
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if not torch.is_tensor(old):
                    assert old == new, func
                elif old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Played:
    """In place of `Graph`: a step recorded on a CPU, under the same bargain of what is put back."""

    def __init__(self, run, states, live):
        assert not live.any()
        before = [state.clone() for state in states]
        run()  # tables are made once and kept
        for state, was in zip(states, before, strict=True):
            state.copy_(was)
        with Recorded() as self.recorded:
            self.logits = run()
        for state, was in zip(states, before, strict=True):
            state.copy_(was)
        self.replay = self.recorded.replay


@pytest.fixture
def played(monkeypatch):
    """Call it, and decoders capture their steps."""
    monkeypatch.setenv("LONGWAVE_KERNELS", "reference")  # the others are not torch's operations
    monkeypatch.setattr(longwave.MemoryLayer, "check_finite", lambda *_: None)  # looks on CPUs alone

    def start():
        monkeypatch.setattr(longwave.decode.steps, "Graph", Played)
        monkeypatch.setattr(StaticDecoder, "captures", property(lambda _: True, lambda *_: None), raising=False)

    return start


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_a_replayed_step_reads_nothing_of_python(llama, make, played):
    """What a captured graph does, as far as a CPU can show it: one step recorded, replayed through many segments."""
    (want, theirs), (got, plain) = both(llama, make, PADS["ragged"])
    played()
    _, (replayed, ours) = both(llama, make, PADS["ragged"])
    assert torch.equal(got, want)
    assert torch.equal(replayed, want)
    check_same(ours, plain)
    check_same(ours, theirs)


@pytest.mark.parametrize("name", ["dense", "fourier", "kivi"])
def test_a_replayed_step_in_16_bits(played, name):
    model, ids = small_half(), tokens(2, 75)
    plain = steps(model, halves(model, name), ids, 40)
    played()
    assert torch.equal(steps(model, halves(model, name), ids, 40), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturing a graph needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["dense", "fourier", "kivi"])
def test_the_graph_steps_as_the_step_does(name, dtype):
    model, ids = small_half(dtype).cuda(), tokens(3, 90).cuda()
    memories = [halves(model, name) for _ in range(2)]
    plain, graph = (
        steps(model, memory, ids, 40, graph=captured) for memory, captured in zip(memories, (False, True), strict=True)
    )
    torch.testing.assert_close(graph, plain, rtol=0, atol=1e-2)
    for a, b in zip(*(memory.memory_layers() for memory in memories), strict=True):
        for x, y in zip(a.materialize(), b.materialize(), strict=True):
            assert torch.isclose(x, y, rtol=1e-2, atol=1e-2).float().mean() > 0.99
    assert memories[0].report() == memories[1].report()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturing a graph needs CUDA")
def test_generate_by_graph_is_transformers_own():
    """float32, where rounding does not choose tokens; rows of different lengths, greedy and sampled."""
    model = small_half(torch.float32).cuda()
    ids, mask = (x.cuda() for x in left_padded(3, 60, [0, 7, 30]))
    for options in (dict(do_sample=False), dict(do_sample=True, top_k=20)):
        found = []
        for loop in (model.generate, lambda *a, **k: longwave.generate(model, *a, **k)):
            torch.manual_seed(3)
            memory = halves(model, "fourier")
            found.append(loop(ids, attention_mask=mask, **into(memory), max_new_tokens=50, **options))
        assert torch.equal(found[0], found[1])
