import hashlib
import json

import pytest
import transformers

from longwave.evals.task import Sample, Setting
from longwave.evals.tasks.longproc import (
    BELIEFS,
    COUNTDOWN,
    PATHS,
    LongProc,
    LongProcTrace,
    belief_lines,
    prefix,
    tagged,
)
from longwave.evals.tasks.longproc.countdown import solves, trace
from longwave.models import smollm2
from tests.conftest import DATA

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")


@pytest.fixture(scope="module")
def setting():
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    return lambda limit=2, chat=False: Setting(tokenizer, None, 42, limit, DATA, chat=chat)


@pytest.mark.parametrize(
    ("numbers", "target", "size", "digest"),
    [
        ([40, 19, 23, 7], 29, 1330, "0394945b960cbf74d8237aa7fcf5ab4ad3bcaab87ac4d271af883c4ea934c0d7"),
        ([9, 16, 6, 18], 12, 12892, "812887c9243bc7855830ce759342a573779be8658b19fe77471049f2619f477c"),
    ],
)
def test_traces_are_the_benchmarks(numbers, target, size, digest):
    written = trace(numbers, target)
    assert len(written) == size
    assert hashlib.sha256(written.encode()).hexdigest() == digest


def test_traces_of_odd_numbers():
    assert trace([1, 1, 1, 1], 50) is None
    assert "Try 0 / 0 (invalid operation). drop this branch." in trace([5, 5, 7, 7], 48)
    assert "exceeds the maximum intermediate result" in trace([9, 16, 6, 18], 12)


def test_solutions_are_computed_and_never_run():
    right = ["40 + 19 = 59", "59 - 23 = 36", " 36-7=29 "]
    assert solves(right, [40, 19, 23, 7], 29)
    for wrong in (
        right[:2],
        [*right, "29 + 0 = 29"],
        ["40 + 19 = 60", *right[1:]],
        ["40 + 40 = 80", *right[1:]],  # there is one of it
        [right[0], "59 / 0 = 0", right[2]],
        [right[0], "59 - 23 = 36.0", right[2]],
        [right[0], "__import__('os').abort()", right[2]],
        [],
    ):
        assert not solves(wrong, [40, 19, 23, 7], 29)
    assert not solves(right, [40, 19, 23, 7], 30)


@needs_data
def test_prompts(setting):
    samples = LongProc().samples(setting())
    assert [s.id for s in samples] == [f"{name}/{n}" for name in (PATHS, BELIEFS, COUNTDOWN) for n in range(2)]
    decode = setting().tokenizer.decode
    path, belief, search = samples[::2]
    assert decode(path.ids[path.context :]).strip().startswith("Now find the route from Lille to Bromsgrove based")
    assert "{" not in decode(path.ids)
    assert decode(belief.ids[belief.context :]).strip().startswith("[QUESTION]\nWhere does Leon believe")
    assert "{Catherine location: patio;" in decode(belief.ids)  # braces are filled once
    assert decode(search.ids[search.context :]).startswith("# Problem\nNumbers: ")
    assert 881 <= len(search.answers[0]) <= 1399
    assert all(s.max_new_tokens == 1024 for s in samples)


@needs_data
def test_references_are_right(setting):
    """Gold as output gives 1 everywhere; nothing, and the prompt's own example, give 0."""
    task = LongProc()
    for sample in task.samples(setting(limit=20)):
        gold = sample.answers[0]
        said = f"<Route>\n{gold}\n</Route>" if sample.meta["set"] == PATHS else gold
        judged = task.judge(sample, said)
        assert (judged.score, judged.metrics["prefix"]) == (1, 1)
        assert task.judge(sample, "").score == 0
        assert task.judge(sample, said[: len(said) // 2]).score == 0


@needs_data
def test_the_reference_is_what_counts(setting):
    for sample in LongProcTrace().samples(setting()):
        text = setting().tokenizer.decode([sample.ids[i] for i in sample.scored])
        assert sample.scored[-1] == len(sample.ids) - 1
        start = {PATHS: "\n<Route>\nFrom ", BELIEFS: "\n", COUNTDOWN: "\n# Search Procedure"}[sample.meta["set"]]
        assert text.startswith(start)
        assert sample.context < sample.scored[0]
    turned = LongProcTrace(sets=PATHS).samples(setting(limit=1, chat=True))[0]
    assert "assistant\n<Route>\nFrom " in setting().tokenizer.decode(turned.ids)


def test_judges():
    task = LongProc()
    route = Sample("x", [1, 2], 1, 9, ("a\nb\nc",), {"set": PATHS})
    cases = {
        "<Route>\na\nb\nc\n</Route>": (1, 1),
        "<Route>\na\nb\nd\n</Route>": (0, 2 / 3),
        "<Route>a\nb\nc\nd</Route>": (0, 1),
        "a\nb\nc": (0, 0),
        "<Route></Route>": (0, 0),
    }
    for output, (score, share) in cases.items():
        judged = task.judge(route, output)
        assert (judged.score, judged.metrics["prefix"]) == pytest.approx((score, share))
    gold = "A's belief:\n- Step 0: (x) {A sees b: True}\n- Step 1: c\nFinal"
    belief = Sample("x", [1, 2], 1, 9, (gold,), {"set": BELIEFS})
    for output, (score, share) in {
        "- Step 0: x, A sees the b: true\n- 1: C.": (1, 1),
        "- Step 0: x, A sees the b: true": (0, 0.5),
        "  - Step 0: x A sees b true": (0, 0),
    }.items():
        judged = task.judge(belief, output)
        assert (judged.score, judged.metrics["prefix"]) == (score, share)
    assert belief_lines("-The A is\nno") == [""]
    assert (prefix([], ["a"]), tagged("<T>a<T>b</T>", "T")) == (0, "a<T>b")


def test_a_folder_of_the_users(setting, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*path_traversal_2k\.json: give source=FOLDER"):
        LongProc(sets=PATHS, level="2k", source=tmp_path).samples(setting())
    folder = tmp_path / PATHS
    folder.mkdir()
    (folder / "prompts.yaml").write_text("USER_PROMPT: 'Towns: {city_context} From {src_city} to {dst_city}?'\n")
    record = {"context_nl": "A to B.", "question_repr": ["A", "B"], "answer_nl": "From A, take a bus to B."}
    (folder / f"{PATHS}_2k.json").write_text(json.dumps([record]))
    (sample,) = LongProc(sets=PATHS, level="2k", source=str(tmp_path)).samples(setting())
    assert setting().tokenizer.decode(sample.ids) == "Towns: A to B. From A to B?"
    assert sample.max_new_tokens == 3072
    (folder / f"{PATHS}_2k.json").write_text(json.dumps([{**record, "question_repr": ["A"]}]))
    with pytest.raises(ValueError, match=r"record 1 has question_repr .* not two cities"):
        LongProc(sets=PATHS, level="2k", source=str(tmp_path)).samples(setting())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": "html"}, "there is no 'html' among the sets of LongProc"),
        ({"level": "1k"}, "level is one of 0.5k, 2k, 8k; got '1k'"),
        ({"count": 0}, "count is a whole number"),
        ({"source": 5}, 'source is "data" or a folder; got 5'),
    ],
    ids=str,
)
@pytest.mark.parametrize("task", [LongProc, LongProcTrace])
def test_bad_options(task, options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)
