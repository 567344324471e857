import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache, QuantizedCache, cache_utils

from longwave.evals.caches import make_methods
from longwave.evals.causal import answer
from longwave.evals.contexts import Contexts
from longwave.evals.evaluation import evaluate
from longwave.evals.recipe import Recipe
from longwave.evals.results import load
from longwave.evals.stock import Quantized
from longwave.frame import storage_bytes
from tests.cli.calls import TEXT
from tests.conftest import into, tokens
from tests.evals.samples import sample

NAME = Quantized.name


FP8 = pytest.param("fp8", {}, marks=pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="no fp8"))
SETTINGS = [
    FP8,
    *(
        pytest.param(
            backend,
            {"nbits": bits, "q_group_size": 8, "residual_length": 16},
            marks=pytest.mark.skipif(not available(), reason=f"{package} is not installed"),
        )
        for backend, package, available in (
            ("quanto", "optimum-quanto", cache_utils.is_optimum_quanto_available),
            ("hqq", "hqq", cache_utils.is_hqq_available),
        )
        for bits in (4, 2)
    ),
]
backends = pytest.mark.parametrize(("backend", "options"), SETTINGS)


@torch.no_grad()
def feed(model, ids, memory):
    return model(ids, **into(memory), use_cache=True).logits


def recipe(*methods, **changes):
    return Recipe(**{"out": "out", "methods": list(methods), "tasks": ["needle"], **changes})


def never(*arguments):
    pytest.fail("loaded a model")


# what can be wrong, whatever is installed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("backend=quanta", "backend is one of quanto, hqq, fp8; got 'quanta'"),
        ("bits=2", f"{NAME} has no option 'bits'; did you mean 'nbits'?"),
        ("budget=0.25", f"{NAME} has no option 'budget'"),
        ("nbits=3", "nbits is one of 2, 4 with backend=quanto; got 3"),
        ("nbits=True", "nbits is one of 2, 4 with backend=quanto; got True"),
        ("backend=hqq,nbits=5", "nbits is one of 1, 2, 3, 4, 8 with backend=hqq; got 5"),
        ("axis_key=1", "axis_key is one of 0, -1 with backend=quanto; got 1"),
        ("backend=hqq,axis_value=-1", "axis_value is one of 0, 1 with backend=hqq; got -1"),
        ("q_group_size=0", "q_group_size is a whole number of numbers, at least 1; got 0"),
        ("residual_length=1.5", "residual_length is a whole number of tokens, at least 1; got 1.5"),
        ("backend=fp8,nbits=4", "backend=fp8 has one scale a layer and takes no other option; got nbits"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError) as error:
        evaluate(recipe(f"{NAME}:{options}"), never)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("backend", "available", "package"),
    [("quanto", "is_optimum_quanto_available", "optimum-quanto"), ("hqq", "is_hqq_available", "hqq")],
)
def test_a_missing_backend_says_what_to_install(monkeypatch, backend, available, package):
    monkeypatch.setattr(cache_utils, available, lambda: False)
    with pytest.raises(ValueError) as error:
        evaluate(recipe(f"{NAME}:backend={backend}"), never)
    assert str(error.value) == f"{NAME} with backend={backend} needs {package}: pip install -U {package}"


def test_options_left_out_are_the_classes_own():
    assert str(Quantized(nbits=2)) == (
        "QuantizedCache(backend=quanto, nbits=2, axis_key=0, axis_value=0, q_group_size=64, residual_length=128)"
    )
    assert str(Quantized(backend="fp8")) == "QuantizedCache(backend=fp8)"


@pytest.mark.parametrize(("backend", "options"), [FP8])
def test_a_backend_that_fails_is_found_before_a_model_is_loaded(monkeypatch, backend, options):
    def broken(self, tensor):
        raise RuntimeError("no compiler\nand a page of details")

    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "_dequantize", broken)
    with pytest.raises(ValueError, match=r"^QuantizedCache\(backend=fp8\) does not work here: no compiler$"):
        evaluate(recipe(f"{NAME}:backend={backend}"), never)


# what it is


@backends
def test_it_answers_as_transformers_does(llama, models, tokenizer, backend, options):
    one, stock = sample("one", 64, 50, new=20), models["llama"][1]
    ids = torch.tensor([list(one.ids)])
    for question in ("after", "with"):
        contexts = Contexts(llama, [one], 0, question)
        ((_, text, cost),) = answer(
            llama, tokenizer, [one], contexts, lambda n: Quantized(backend, **options).cache(llama, n)
        )
        expected = QuantizedCache(backend, stock.config, **options)
        if question == "after":
            feed(stock, ids[:, :50], expected)
        out = stock.generate(ids, **into(expected), max_new_tokens=20, do_sample=False)
        assert text == tokenizer.decode(out[0, 64:], skip_special_tokens=True)
        assert cost["rows"] == 1
        assert cost["bytes"] < 0.5 * cost["dense_bytes"]


def storages(tensors):
    """Address -> bytes of what is really allocated; wrappers and fakes claim storage that they do not have."""
    own = (t for t in tensors if not hasattr(type(t), "__tensor_flatten__") and not isinstance(t, FakeTensor))
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}


def alive():
    gc.collect()
    return storages(x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


@backends
def test_the_report_counts_every_byte_that_reading_leaves_alive(llama, backend, options):
    ids, dense = tokens(1, 48), DynamicCache(config=llama.config)
    feed(llama, ids, dense)
    quantized = Quantized(backend, **options)
    feed(llama, ids, quantized.cache(llama))  # what is made once, on first use, is not the cache's
    before = alive()
    memory = quantized.cache(llama)
    for part in (ids[:, :40], ids[:, 40:]):  # the second part waits in the residual
        feed(llama, part, memory)
    new = {address: size for address, size in alive().items() if address not in before}
    report = memory.report()
    assert report.nbytes == sum(new.values()) == sum(report.parts.values())
    assert (report.tokens, report.batch) == (48, 1)
    assert report.dense_nbytes == storage_bytes([x for layer in dense.layers for x in (layer.keys, layer.values)])
    assert report.parts["dense"] == (0 if backend == "fp8" else report.dense_nbytes * 8 // 48)


@backends
def test_bytes_are_codes_and_scales(llama, backend, options):
    memory = Quantized(backend, **options).cache(llama)
    feed(llama, tokens(1, 40), memory)
    sides, numbers = 2 * 3, 2 * 40 * 8  # K and V of three layers; heads x tokens x channels
    grouped = numbers // 8 * (options.get("nbits", 0) + 2 * 4)  # a float32 scale and a zero point for 8 codes
    expected = numbers + 4 if backend == "fp8" else grouped
    assert memory.report().parts == {"quantized": sides * expected, "dense": 0}


@pytest.mark.parametrize(("backend", "options"), [FP8])
def test_a_run_measures_it_one_prompt_at_a_time(llama, tokenizer, tmp_path, backend, options):
    (tmp_path / "hay.txt").write_text(TEXT)
    methods = ["dense", f"{NAME}:backend={backend}"]
    tasks = [
        f"needle:lengths=180,depths=0.1,0.9,haystack={tmp_path / 'hay.txt'}",
        f"divergence:contexts=100,scored=20,windows=1,text={tmp_path / 'hay.txt'}",
    ]
    evaluate(recipe(*methods, tasks=tasks, out=tmp_path / "out"), lambda *given: (llama, tokenizer))
    loaded = load(tmp_path / "out")
    assert [row["method"] for row in loaded.rows] == methods * 3
    assert {row["rows"] for row in loaded.rows} == {1}
    assert loaded.header["methods"][methods[1]] == "QuantizedCache(backend=fp8)"
    for exact, row in zip(loaded.rows[::2], loaded.rows[1::2], strict=True):
        assert row["dense_bytes"] == exact["dense_bytes"]
        assert row["bytes"] / row["dense_bytes"] == pytest.approx(0.25, abs=0.001)  # 8 bits of 32, and a scale a side
    assert loaded.rows[-1]["metrics"]["kl"] > 0


@pytest.mark.parametrize(("backend", "options"), [FP8])
def test_rows_are_refused(llama, backend, options):
    with pytest.raises(ValueError, match=f"{NAME} reads one prompt at a time, not 2"):
        Quantized(backend).cache(llama, 2)
    assert make_methods(llama, recipe(f"{NAME}:backend=fp8", batch=4))[2] == 1


@pytest.mark.parametrize(("backend", "options"), [FP8])
def test_models_with_sliding_layers_are_refused_before_anything_is_measured(models, backend, options):
    with pytest.raises(ValueError, match="only supported for models with only full attention layers"):
        make_methods(models["gemma3"][0], recipe(f"{NAME}:backend=fp8"))


@pytest.mark.parametrize(("backend", "options"), SETTINGS[1:2])
def test_a_length_that_groups_do_not_divide_says_what_fits(llama, backend, options):
    memory = Quantized(backend, **options, axis_key=-1).cache(llama)
    with pytest.raises(ValueError, match=r"cannot hold 13 tokens of this model: Group size .* divides the head's 8 ch"):
        feed(llama, tokens(1, 13), memory)


@pytest.mark.parametrize(("backend", "options"), [FP8])
def test_too_little_memory_is_not_taken_for_such_a_length(llama, monkeypatch, backend, options):
    def full(self, tensor, scale=None):
        raise torch.OutOfMemoryError("39 GiB")

    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "_quantize", full)
    with pytest.raises(torch.OutOfMemoryError):
        feed(llama, tokens(1, 13), Quantized(backend).cache(llama))
