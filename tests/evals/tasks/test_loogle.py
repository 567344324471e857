import json
from array import array

import pytest
import transformers

import longwave.models
from longwave.evals.task import Sample, Setting
from longwave.evals.tasks import parse_task
from longwave.evals.tasks.loogle import CLOZE, SETS, LooGLE, parse_masks, rouge_recall
from tests.conftest import DATA

needs_data = pytest.mark.skipif(not (DATA / "loogle").exists(), reason=f"no evaluation data at {DATA}")
TEXT = " ".join(f"word{number}" for number in range(100))
PAIRS = [{"Q": "Why was it?", "A": "rain"}, {"Q": "Who?", "A": "Bo"}]
MASKS = [{"Q": "<mask-0> met <mask-1>.", "A": {"<mask-0>": "Bo Li", "<mask-1>": "Al"}}]


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "loogle"
    (folder / "config").mkdir(parents=True)
    prompts = dict.fromkeys(SETS[:2], "Answer.\n{input}\nQuestion: {Q}\nAnswer: ")
    prompts[CLOZE] = "Fill in, as {{'a': 'b'}}.\n{input}\n{Q} Which?"
    prompts["longdep_summarization"] = "Sum up.\n{input}\n Summary: "
    (folder / "config" / "task2prompt.json").write_text(json.dumps(prompts))
    (folder / "config" / "task2maxlen.json").write_text(json.dumps(dict(zip(SETS, (30, 50, 5, 60), strict=True))))
    for name in SETS[:2]:
        write(tmp_path, name, {"qa_pairs": str(PAIRS)}, {"qa_pairs": str(PAIRS[1:]), "input": TEXT.upper()})
    write(tmp_path, CLOZE, {"qa_pairs": str(MASKS)})
    write(tmp_path, "longdep_summarization", {"qa_pairs": "none", "output": "All of it."})
    return tmp_path


def write(folder, name, *records):
    path = folder / "loogle" / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"input": TEXT, "title": "T", "output": "None", **r}) + "\n" for r in records))


def judged(name, output, gold):
    return LooGLE().judge(Sample("x", array("i", [1, 2]), 1, answers=(gold,), meta={"set": name}), output)


def test_prompts(made, tokenizer):
    samples = {s.id: s for s in LooGLE().samples(Setting(tokenizer, data=made))}
    assert list(samples) == [
        *(f"{name}/{number}" for name in SETS[:2] for number in ("0/0", "0/1", "1/0")),
        f"{CLOZE}/0/0",
        "longdep_summarization/0/0",
    ]
    text = {id: tokenizer.decode(s.ids) for id, s in samples.items()}
    assert text["shortdep_qa/0/1"] == f"Answer.\n{TEXT}\nQuestion: Who?\nAnswer: "
    assert text[f"{CLOZE}/0/0"] == f"Fill in, as {{'a': 'b'}}.\n{TEXT}\n<mask-0> met <mask-1>. Which?"
    assert text["longdep_summarization/0/0"] == f"Sum up.\n{TEXT}\n Summary: "
    assert samples["longdep_summarization/0/0"].answers == ("All of it.",)
    assert samples["longdep_qa/0/0"].max_new_tokens == 50
    for sample in samples.values():
        assert tokenizer.decode(sample.ids[: sample.context]).lower().endswith(TEXT)


def test_documents_lose_their_middle(made, tokenizer):
    first, second = LooGLE(sets="shortdep_qa").samples(Setting(tokenizer, 330, data=made, limit=2))
    whole = f"Answer.\n{TEXT}\nQuestion: Why was it?\nAnswer: "
    assert tokenizer.decode(first.ids) == whole[:150] + whole[-150:]
    assert first.cut_from == len(whole)
    assert first.ids[: first.context] == second.ids[: second.context]


def test_a_limit_gives_a_prefix_of_every_set(made, tokenizer):
    whole = LooGLE(sets=SETS[:2]).samples(Setting(tokenizer, data=made))
    for limit in (1, 2, 3):
        part = LooGLE(sets=SETS[:2]).samples(Setting(tokenizer, data=made, limit=limit))
        assert part == [*whole[:limit], *whole[3 : 3 + limit]]


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("{'<mask-0>': 'Bo', '<mask-1>': \"It's\"}", {"<mask-0>": "Bo", "<mask-1>": "It's"}),
        ('Here: ```{"<mask-0>": "Bo",\n"<mask-1>": null}``` {}', {"<mask-0>": "Bo", "<mask-1>": "None"}),
        ("{'<mask-0>': 3}", {"<mask-0>": "3"}),
        ("{'<mask-0>'}", {}),
        ("{'<mask-0>': 'Bo', ", {}),
        ("{'<mask-0>': Bo}", {}),
        ("Bo", {}),
    ],
)
def test_masks_are_read(output, named):
    assert parse_masks(output) == named


def test_clozes_count_by_masks():
    gold = json.dumps(MASKS[0]["A"])
    half = judged(CLOZE, "{'<mask-0>': 'Bo', '<mask-1>': 'Al'}", gold)
    assert half.score == 0.5
    assert half.metrics == {"exact": 1, "partial": 1, "masks": 2}
    none = judged(CLOZE, "no", json.dumps({"<mask-0>": "Bo"}))
    assert none.score == 0
    rows = [{"meta": {"set": CLOZE}, "score": j.score, "metrics": j.metrics} for j in (half, none)]
    assert LooGLE().total(rows) == pytest.approx(100 / 3)
    other = {"meta": {"set": "longdep_qa"}, "score": 1.0, "metrics": {}}
    assert LooGLE().total([*rows, other]) == pytest.approx((100 + 100 / 3) / 2)


def test_answers_count_by_recall():
    answer = judged("longdep_qa", "it was the rain of may", "the rain")
    assert answer.score == answer.metrics["rougeL"] == pytest.approx(1)
    assert answer.metrics["rouge2"] == pytest.approx(1)
    assert answer.metrics["f1"] == pytest.approx(2 / 6)  # "the" is dropped
    assert judged("longdep_qa", "", "the rain").score == 0
    assert rouge_recall("...", "the rain") == dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"qa_pairs": "[{'Q': 1"}, "record 1 has qa_pairs that are no list"),
        ({"qa_pairs": "[{'Q': 'Why?'}]"}, "record 1 has qa_pairs that are no list"),
        ({"qa_pairs": "open('x')"}, "record 1 has qa_pairs that are no list"),
        ({"qa_pairs": "[]"}, "record 1 has no questions"),
    ],
)
def test_broken_records(made, tokenizer, broken, message):
    write(made, "longdep_qa", broken)
    with pytest.raises(ValueError, match=message):
        LooGLE(sets="longdep_qa").samples(Setting(tokenizer, data=made))


def test_wrong_options_and_missing_files(made, tokenizer):
    with pytest.raises(ValueError, match="did you mean 'longdep_qa'"):
        parse_task("loogle:sets=longdep_qas")
    with pytest.raises(ValueError, match="no folder '/no/such'"):
        LooGLE(source="/no/such").samples(Setting(tokenizer, data=made))
    with pytest.raises(ValueError, match=r"there is no shortdep_qa.jsonl"):
        LooGLE(source=str(made)).samples(Setting(tokenizer, data=made))


@needs_data
def test_real_records_share_their_contexts():
    real = transformers.AutoTokenizer.from_pretrained(longwave.models.smollm2())
    samples = LooGLE().samples(Setting(real, 2048, data=DATA, limit=12))
    assert len(samples) == 12 + 12 + 12 + 5
    families = {}
    for sample in samples:
        families.setdefault(sample.id.rsplit("/", 1)[0], []).append(sample)
        assert len(sample.ids) + sample.max_new_tokens <= 2048
        assert sample.cut_from > 10000
    for family in families.values():
        assert len({s.ids[: s.context].tobytes() for s in family}) == 1
    assert sum(len(family) > 1 for family in families.values()) >= 3
    masks = json.loads(next(s for s in samples if s.meta["set"] == CLOZE).answers[0])
    assert all(mask.startswith("<mask-") for mask in masks)
