import json
import logging
import subprocess
import sys

import pytest
import torch

import longwave
from tests.conftest import into, random_profile
from tests.diffusion.conftest import build
from tests.evals.hybrids import KINDS, hybrid

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from longwave.evals.harness import LongwaveLM

SMALL = {"segment": 16, "sinks": 2, "window": 16}
TEXT = " the quick brown fox jumps over the lazy dog, and then the dog sleeps until the fox is back;"
PAIRS = [  # different lengths of context and continuation, an empty context, trailing spaces
    (TEXT * 2, " yes"),
    (TEXT + "why?", " because of the fox"),
    ("", "alone"),
    ("short", " one"),
    (TEXT * 2 + "so  ", "it is"),
    (TEXT * 2, " no, it is not"),
    (TEXT * 2, " maybe"),
]


@pytest.fixture(scope="module")
def profile(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("profiles") / "profile.json"
    random_profile(models["llama"][1]).save(path)
    return str(path)


@pytest.fixture
def make(folder, profile):
    def build(**arguments):
        if arguments.get("method") != "dense":
            arguments = {"budget": 0.3, "profile": profile, **SMALL, **arguments}
        arguments = {"device": "cpu", "dtype": "float32", **arguments}
        return LongwaveLM(str(folder), prefix_token_id=1, **arguments)

    return build


def asked(kind, *arguments):
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def loglikelihood(lm, pairs):
    return lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)


def rolling(lm, *texts):
    return lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True)


def generate(lm, *prompts, **kwargs):
    return lm.generate_until(asked("generate_until", *((prompt, kwargs) for prompt in prompts)), disable_tqdm=True)


def close(got, wanted, tolerance=1e-4):
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=tolerance)


@torch.no_grad()
def stock_score(stock, context, continuation):
    """What the untouched model says of token lists."""
    ids = torch.tensor([[*context, *continuation]])
    logprobs = stock(ids[:, :-1]).logits[0, len(context) - 1 :].log_softmax(-1)
    targets = ids[0, len(context) :]
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


def stock_pair(stock, tokenizer, context, continuation):
    moved = len(context) - len(context.rstrip())  # the harness moves spaces; with one id a character nothing changes
    context, continuation = context[: len(context) - moved], context[len(context) - moved :] + continuation
    return stock_score(stock, tokenizer(context).input_ids or [1], tokenizer(continuation).input_ids)


@pytest.fixture
def passes(monkeypatch):
    """The number of tokens of each forward pass."""
    seen = []
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def counted(self, input_ids=None, *args, **kwargs):
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return seen


def test_it_is_registered_beside_the_harness_own_models():
    assert get_model("longwave") is LongwaveLM
    assert get_model("dummy").__name__ == "DummyLM"


def test_without_the_harness_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "longwave.evals.harness")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'longwave\[lm-eval\]'"):
        import longwave.evals.harness  # noqa: F401


# scores


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("arguments", [{"method": "dense"}, {"budget": 1.0}, {"method": "dense", "step": 5}], ids=str)
@pytest.mark.parametrize("question_tokens", [1, 7])
def test_keeping_everything_gives_the_stock_models_scores(
    make, models, tokenizer, arguments, batch_size, question_tokens
):
    lm = make(batch_size=batch_size, question_tokens=question_tokens, **arguments)
    close(loglikelihood(lm, PAIRS), [stock_pair(models["llama"][1], tokenizer, *pair) for pair in PAIRS])


def test_a_compressed_context_changes_scores_and_the_bytes_say_how_much(make):
    dense, small = make(method="dense"), make(budget=0.1)
    pairs = [(TEXT * 4, " yes")]
    (exact, _), (got, _) = *loglikelihood(dense, pairs), *loglikelihood(small, pairs)
    assert abs(exact - got) > 1e-3
    assert small.report()["bytes_ratio"] < 0.8 < 1 <= dense.report()["bytes_ratio"]
    info = small.get_model_info()["longwave"]
    assert info["requests"] == 1
    assert info["budget"] == 0.1
    assert info["bytes"] == pytest.approx(info["bytes_ratio"] * info["dense_bytes"], rel=1e-4)
    json.dumps(small.get_model_info())


@pytest.mark.parametrize("question_tokens", [1, 9])
@pytest.mark.parametrize("step", [256, 11])
def test_every_scored_token_reads_the_compressed_context(make, llama, tokenizer, profile, step, question_tokens):
    lm = make(step=step, question_tokens=question_tokens)
    context, continuation = tokenizer(TEXT * 3).input_ids, tokenizer(" because the fox came home").input_ids
    cache = longwave.cache(llama, "fourier", budget=0.3, profile=profile, **SMALL)
    ids = torch.tensor([[*context, *continuation]])
    split = len(context) - question_tokens
    logits = []
    with torch.no_grad():
        llama(ids[:, :split], **into(cache), use_cache=True)
        for start in range(split, ids.shape[1] - 1, step):
            end = min(start + step, ids.shape[1] - 1)
            logits.append(llama(ids[:, start:end], **into(cache), use_cache=True).logits)
    logprobs = torch.cat(logits, dim=1)[0, question_tokens - 1 :].log_softmax(-1)
    wanted = float(logprobs.gather(1, torch.tensor(continuation)[:, None]).sum())
    got = loglikelihood(lm, [(TEXT * 3, " because the fox came home")])[0][0]
    assert got == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("step", [256, 7])
def test_scores_do_not_depend_on_the_batch(make, step):
    alone = [loglikelihood(make(step=step), [pair])[0] for pair in PAIRS]
    for batch_size in (1, 2, 16):
        close(loglikelihood(make(step=step, batch_size=batch_size), PAIRS), alone)


def test_requests_of_one_context_share_its_reading(make, passes):
    choices = [(TEXT * 2, " " + word) for word in ("one", "two", "three", "four")]
    loglikelihood(make(batch_size=4), choices)
    read = len(TEXT * 2) - 1
    assert passes == [(1, read), (4, 6)]  # the context once, then the question's token and five letters
    passes.clear()
    loglikelihood(make(batch_size=1), choices)
    assert sorted(passes) == sorted([(1, read), (1, 4), (1, 4), (1, 5), (1, 6)])


def test_greedy_is_true_only_where_every_token_is_the_likeliest(make, models, tokenizer):
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    out = models["llama"][1].generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    likely = tokenizer.decode(out)
    assert tokenizer(likely).input_ids == out
    other = likely[:-1] + ("x" if likely[-1] != "x" else "y")
    got = loglikelihood(make(method="dense", batch_size=2), [(TEXT, likely), (TEXT, other), (TEXT, "q" + likely)])
    assert [greedy for _, greedy in got] == [True, False, False]


def test_too_long_pairs_lose_their_first_tokens_with_one_warning(make, models, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)  # its own set-up may have run already
    lm = make(method="dense", max_length=50, batch_size=2)
    pairs = [(TEXT, " yes"), (TEXT * 2, " no"), ("short", " one")]
    with caplog.at_level("WARNING", logger="lm_eval.longwave"):
        got = loglikelihood(lm, pairs)
    wanted = []
    for context, continuation in pairs:
        c, d = tokenizer(context).input_ids, tokenizer(continuation).input_ids
        wanted.append(stock_score(models["llama"][1], [*c, *d][-51 : -len(d)], d))
    close(got, wanted)
    assert lm.report()["truncated"] == 2
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"2 of 3 prompts do not fit into max_length=50 and lost their first tokens (at most {2 * len(TEXT) + 3 - 51})"
    ]


def test_a_continuation_has_tokens_that_fit(make):
    lm = make(method="dense", max_length=20)
    with pytest.raises(ValueError, match="from 1 to 20 tokens, not 0, in"):
        loglikelihood(lm, [("text", "")])
    with pytest.raises(ValueError, match="from 1 to 20 tokens, not 21"):
        loglikelihood(lm, [("text", "a" * 21)])


# rolling


@pytest.mark.parametrize("arguments", [{"method": "dense"}, {"budget": 1.0}, {"method": "dense", "step": 13}], ids=str)
def test_rolling_equals_the_stock_model(make, models, tokenizer, arguments):
    texts = [TEXT * 3, "brief", "", TEXT]
    lm = make(max_length=100, batch_size=3, **arguments)
    wanted = []
    for text in texts:
        windows = map(make_disjoint_window, get_rolling_token_windows(tokenizer(text).input_ids, 1, 100, 1))
        wanted.append(sum(stock_score(models["llama"][1], *window)[0] for window in windows))
    assert rolling(lm, *texts) == pytest.approx(wanted, abs=1e-3)


def test_a_first_window_is_compressed_chunk_by_chunk(make, llama, tokenizer, profile):
    ids = torch.tensor([[1, *tokenizer(TEXT * 3).input_ids]])
    cache = longwave.cache(llama, "fourier", budget=0.3, profile=profile, **SMALL)
    wanted = longwave.evals.loss.score(llama, cache, ids, step=32).losses.sum()
    lm = make(step=32)
    assert rolling(lm, TEXT * 3) == pytest.approx([-float(wanted)], abs=1e-3)
    assert rolling(make(step=512), TEXT * 3) != pytest.approx([-float(wanted)], abs=1e-3)
    assert lm.report()["bytes_ratio"] < 0.8


# generation


def stock_text(stock, tokenizer, prompt, count):
    ids = torch.tensor([tokenizer(prompt).input_ids or [1]])
    out = stock.generate(ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


PROMPTS = [TEXT * 2, TEXT, "short", "", TEXT * 2 + "and so", TEXT]


@pytest.mark.parametrize("arguments", [{"method": "dense"}, {"budget": 1.0}], ids=str)
@pytest.mark.parametrize("question_tokens", [1, 7])
def test_greedy_text_is_the_stock_models(make, models, tokenizer, arguments, question_tokens):
    lm = make(batch_size=4, question_tokens=question_tokens, **arguments)
    wanted = [stock_text(models["llama"][1], tokenizer, prompt, 12) for prompt in PROMPTS]
    assert generate(lm, *PROMPTS, until=["\x00"], max_gen_toks=12) == wanted
    assert generate(lm, *PROMPTS, until=[], max_new_tokens=12, temperature=0.0, do_sample=False, top_p=0.5) == wanted


def test_stop_texts_cut_and_end_early(make, models, tokenizer, passes):
    lm = make(method="dense", batch_size=2)
    whole = stock_text(models["llama"][1], tokenizer, TEXT, 40)
    stop, late = whole[5:7], whole[20:23]
    passes.clear()
    assert generate(lm, TEXT, until=[late, stop], max_gen_toks=40) == [whole[: whole.index(stop)]]
    assert len(passes) == 1 + whole.index(stop) + 2  # the context, then a pass for each new token
    assert generate(lm, TEXT, until=stop, max_gen_toks=40) == [whole[: whole.index(stop)]]


def test_text_does_not_depend_on_the_batch(make):
    alone = [generate(make(), prompt, max_gen_toks=10)[0] for prompt in PROMPTS]
    for batch_size in (2, 16):
        lm = make(batch_size=batch_size)
        assert generate(lm, *PROMPTS, max_gen_toks=10) == alone
    assert alone != generate(make(method="dense"), *PROMPTS, max_gen_toks=10)


def test_tasks_with_their_own_settings_run_together(make, models, tokenizer):
    lm = make(method="dense", batch_size=4)
    kwargs = [{"max_gen_toks": 3}, {"max_gen_toks": 9, "until": ["\x00"]}, {"max_gen_toks": 3}]
    got = lm.generate_until(asked("generate_until", *zip([TEXT, TEXT, "short"], kwargs, strict=True)), True)
    wanted = [(TEXT, 3), (TEXT, 9), ("short", 3)]
    assert got == [stock_text(models["llama"][1], tokenizer, prompt, count) for prompt, count in wanted]


def test_too_long_prompts_lose_their_first_tokens(make, models, tokenizer):
    lm = make(method="dense", max_length=60)
    prompt = TEXT[-50:]
    assert generate(lm, TEXT, prompt, max_gen_toks=10) == [stock_text(models["llama"][1], tokenizer, prompt, 10)] * 2
    assert lm.report()["truncated"] == 1
    with pytest.raises(ValueError, match="max_gen_toks=60 leaves no room for a prompt in max_length=60"):
        generate(lm, TEXT, max_gen_toks=60)


def test_sampling_is_honoured(make):
    lm = make(method="dense")
    torch.manual_seed(0)
    first = generate(lm, TEXT, do_sample=True, temperature=3.0, max_gen_toks=20)
    assert first != generate(lm, TEXT, temperature=3.0, max_gen_toks=20)
    torch.manual_seed(0)
    assert first == generate(lm, TEXT, temperature=3.0, max_gen_toks=20)
    assert generate(lm, TEXT, temperature=3.0, top_k=1, max_gen_toks=8) == generate(lm, TEXT, max_gen_toks=8)


def test_an_end_token_ends_a_text(make, models, tokenizer):
    lm = make(method="dense", batch_size=2)
    text = stock_text(models["llama"][1], tokenizer, TEXT, 12)
    lm.model.generation_config.eos_token_id = tokenizer(text[4]).input_ids[0]
    assert generate(lm, TEXT, "short", max_gen_toks=12)[0] == text[: text.index(text[4])]


# arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "furier"}, "did you mean 'fourier'"),
        (
            {"segmnt": 64},
            "'segmnt' is neither an argument of longwave nor an option of fourier; did you mean 'segment'",
        ),
        ({"max_lenght": 64}, "did you mean 'max_length'"),
        ({"method": "dense", "window": 16}, "'window' is neither an argument of longwave nor an option of dense"),
        ({"window": 0}, "window is a whole number of tokens, at least 1; got 0"),
        ({"budget": 2}, "a budget is a fraction"),
        ({"batch_size": "auto"}, "give batch_size as a number of rows"),
        ({"batch_size": 0}, "batch_size is a whole number of rows, at least 1; got 0"),
        ({"question_tokens": 0}, "question_tokens is a whole number of tokens, at least 1; got 0"),
        ({"step": "fast"}, "step is a whole number of tokens, at least 1; got 'fast'"),
        ({"device": "cuda:99"}, "cannot use device 'cuda:99'"),
        ({"device": "gpu"}, "cannot use device 'gpu'"),
        ({"dtype": "float8"}, "dtype is one of auto, float32, bfloat16, float16; got 'float8'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        LongwaveLM("/no/such/model", **arguments)


def test_a_masked_diffusion_model_is_not_read_as_causal_text(tokenizer, tmp_path):
    build("llada").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="looks in both directions"):
        LongwaveLM(str(tmp_path), method="dense", device="cpu", dtype="float32")


def test_arguments_that_need_the_model_are_checked(make, folder):
    with pytest.raises(ValueError, match="at most this model's window of 512 tokens, got 513"):
        make(max_length=513)
    with pytest.raises(ValueError, match="no BOS or EOS token to stand for an empty context: give prefix_token_id"):
        loglikelihood(LongwaveLM(str(folder), method="dense", device="cpu"), [("", "text")])
    with pytest.raises(ValueError, match="has no chat template: leave apply_chat_template out"):
        make(method="dense").apply_chat_template([{"role": "user", "content": "hello"}])


def test_method_options_arrive(make, folder):
    assert make(segment=32)._empty.method.method.segment == 32
    kivi = LongwaveLM(str(folder), method="kivi", device="cpu", bits=[4, 2])
    assert kivi._empty.method.method.bits == (4, 2)


def test_no_method_option_is_hidden_by_an_argument():
    import inspect

    from longwave.methods import METHODS

    own = set(inspect.signature(LongwaveLM).parameters)
    assert not [name for cls in METHODS.values() for name in cls.__dataclass_fields__ if name in own]


def test_a_budget_in_bytes_holds_for_one_row(make):
    lm = make(budget="90KiB", batch_size=4, max_length=400)
    assert lm.batch_size == 1
    loglikelihood(lm, [(TEXT * 2, " yes"), (TEXT * 2, " no")])
    assert lm.report()["bytes"] <= 2 * 90 * 1024
    assert lm.report()["bytes"] < lm.report()["dense_bytes"]


def test_chat_templates(make):
    lm = make(method="dense")
    lm.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not (loop.last and m.role == 'assistant') %}</>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "hello"}]
    assert lm.apply_chat_template(turns) == "<user>hello</><assistant>"
    begun = [*turns, {"role": "assistant", "content": "Well"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "<user>hello</><assistant>Well"
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert "/" not in lm.tokenizer_name


def test_bos_is_not_written_twice(make):
    lm = make(method="dense")
    lm.tokenizer = type("T", (), {"bos_token": "<s>", "bos_token_id": 7, "eos_token_id": None})()
    calls = []
    type(lm.tokenizer).__call__ = lambda self, text, add_special_tokens, verbose: (
        calls.append(add_special_tokens) or type("E", (), {"input_ids": [5]})
    )
    lm.tok_encode("<s>hello"), lm.tok_encode("hello"), lm.tok_encode("hello", add_special_tokens=False)
    assert calls == [False, True, False]
    lm._prefix = None
    assert lm.prefix_token_id == 7


# against the harness's own model


def test_dense_agrees_with_the_harness_own_model(folder, make):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(folder), device="cpu", prefix_token_id=1, batch_size=2, max_length=200)
    theirs.tokenizer.eos_token = "<pad>"  # it cannot do without one
    ours = make(method="dense", batch_size=3, max_length=200)
    pairs = [*PAIRS, (TEXT * 3, " cut from the left")]
    close(loglikelihood(ours, pairs), loglikelihood(theirs, pairs))
    texts = [TEXT * 5, TEXT, "brief"]
    assert rolling(ours, *texts) == pytest.approx(rolling(theirs, *texts), abs=1e-3)
    prompts = [TEXT * 3, TEXT, "short"]
    for until in ([], ["e"], ["th", "o"]):
        kwargs = {"until": until, "max_gen_toks": 16, "do_sample": False}
        assert generate(ours, *prompts, **kwargs) == generate(theirs, *prompts, **kwargs)


# the harness itself


@pytest.fixture
def tasks(tmp_path):
    """Two offline tasks."""
    questions = [{"text": TEXT * 2 + f"{n}?", "choices": [" yes", " no", " maybe"], "gold": n % 3} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "data.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "metadata": {"version": 1},
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_target": "yes",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
    return TaskManager(include_path=str(folder), include_defaults=False), questions


def test_simple_evaluate(folder, tasks, models, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manager, questions = tasks
    results = lm_eval.simple_evaluate(
        model="longwave",
        model_args=f"pretrained={folder},method=dense,dtype=float32,prefix_token_id=1",
        batch_size="2",
        device="cpu",
        tasks=["tiny_choice", "tiny_text"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    stock = models["llama"][1]
    right = 0
    for sample, question in zip(results["samples"]["tiny_choice"], questions, strict=True):
        wanted = [stock_pair(stock, tokenizer, question["text"], choice) for choice in question["choices"]]
        assert [float(r[0][0]) for r in sample["resps"]] == pytest.approx([v for v, _ in wanted], abs=1e-4)
        right += max(range(3), key=lambda i: wanted[i][0]) == question["gold"]
    assert results["results"]["tiny_choice"]["acc,none"] == right / 4
    texts = [sample["resps"][0][0] for sample in results["samples"]["tiny_text"]]
    assert texts == [stock_text(stock, tokenizer, question["text"], 8).split("e")[0] for question in questions]
    assert results["config"]["longwave"]["requests"] == 4 * 3 + 4
    assert results["config"]["longwave"]["bytes_ratio"] >= 1


def test_simple_evaluate_with_a_compressed_cache(folder, tasks, profile):
    results = lm_eval.simple_evaluate(
        model="longwave",
        model_args={"pretrained": str(folder), "budget": 0.3, "profile": profile, "device": "cpu", **SMALL},
        tasks=["tiny_choice", "tiny_text"],
        task_manager=tasks[0],
        bootstrap_iters=0,
    )
    assert results["config"]["longwave"]["bytes_ratio"] < 1
    assert results["config"]["longwave"]["method"].startswith("fourier(measured plan for 0.3")


def test_answers_are_cached_by_the_harness(folder, tasks, tmp_path, passes):
    def run():
        passes.clear()
        results = lm_eval.simple_evaluate(
            model="longwave",
            model_args={"pretrained": str(folder), "method": "dense", "device": "cpu"},
            tasks=["tiny_choice", "tiny_text"],
            task_manager=tasks[0],
            bootstrap_iters=0,
            use_cache=str(tmp_path / "answers"),
        )
        return [[sample["resps"] for sample in samples] for samples in results["samples"].values()], len(passes)

    (first, some), (second, none) = run(), run()
    assert first == second
    assert some > 0 == none


def test_the_command_line_is_the_harness_own_and_longwave_alone_does_not_load_it():
    code = """
import runpy, sys, longwave, longwave.cli, longwave.evals.causal
assert "lm_eval" not in sys.modules
sys.argv = ["harness", "--help"]
runpy.run_module("longwave.evals.harness", run_name="__main__")  # what python -m does
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Language Model Evaluation Harness" in done.stdout
    assert "validate" in done.stdout


# models some of whose layers are not full attention


@pytest.fixture(scope="module", params=KINDS)
def mixed(request, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrids") / request.param
    model = hybrid(request.param)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, path


@pytest.mark.parametrize(("batch_size", "step"), [(1, 256), (4, 20), (4, 3)])
def test_a_hybrid_is_the_model_whatever_the_batch(mixed, tokenizer, batch_size, step):
    stock, path = mixed
    given = {"device": "cpu", "dtype": "float32", "prefix_token_id": 1, "question_tokens": 3}
    lm = LongwaveLM(str(path), "dense", batch_size=batch_size, step=step, **given)
    close(loglikelihood(lm, PAIRS), [stock_pair(stock, tokenizer, *pair) for pair in PAIRS], 3e-3)
    wanted = [stock_text(stock, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert generate(lm, *PROMPTS, max_gen_toks=6) == wanted


def test_a_hybrid_compressed_scores_alike_whatever_the_batch(mixed):
    alone, together = (
        LongwaveLM(
            str(mixed[1]), "streaming", 0.3, sinks=2, window=16, device="cpu", dtype="float32", batch_size=size,
            prefix_token_id=1,
        )
        for size in (1, 4)
    )  # fmt: skip
    close(loglikelihood(together, PAIRS), loglikelihood(alone, PAIRS), 3e-3)
    texts = [TEXT * 2, TEXT, "short"]
    assert rolling(together, *texts) == pytest.approx(rolling(alone, *texts), abs=3e-3)
    assert generate(together, *texts, max_gen_toks=6) == generate(alone, *texts, max_gen_toks=6)
    assert together.report()["bytes_ratio"] < 1
