import itertools
import json
import statistics
from array import array

import pytest
import transformers

import longwave.models
from longwave.evals.task import Sample, Setting
from longwave.evals.tasks import parse_task
from longwave.evals.tasks.infinitebench import FINDS, NEW_TOKENS, SYNTHETIC, TEMPLATES, InfiniteBench, find
from tests.conftest import DATA

needs_data = pytest.mark.skipif(not (DATA / "infinitebench").exists(), reason=f"no evaluation data at {DATA}")
NOISE = "Nothing is here."
OPTIONS = "A. {OPTION_A} B. {OPTION_B} C. {OPTION_C} D. {OPTION_D}"
SHAPES = {  # ours, with the fields of the official ones
    **dict.fromkeys(NEW_TOKENS, "Read.\n\n{context}\n\n{input}"),
    "math_find": "{prefix}\n\n{context}\n\n{input}",
    "math_calc": "Compute.\n\n{context}",
    "code_run": "There is {func}.\n\n{context}\n\nWhat is {func_call}?",
    "code_debug": "Find it.\n\n{context}\n\n" + OPTIONS,
    "longbook_qa_eng": "Read.\n\n{context}\n\nQuestion: {question}",
    "longbook_qa_chn": "Read.\n\n{context}\n\nQuestion: {question}",
    "longbook_choice_eng": "Read.\n\n{context}\n\nQuestion: {question}\n" + OPTIONS,
    "longbook_sum_eng": "Sum up.\n\n{context}",
    "longdialogue_qa_eng": "Guess.\n\n{context}\n\nWho?",
}
BOOK = " ".join(f"word{number}" for number in range(300))


@pytest.fixture
def made(tmp_path):
    (tmp_path / "infinitebench").mkdir()
    (tmp_path / "ruler").mkdir()
    base = {name: shape + " It is" for name, shape in SHAPES.items()}
    templates = {TEMPLATES["chat"]: SHAPES, TEMPLATES["base"]: base}
    (tmp_path / "infinitebench" / "templates.json").write_text(json.dumps(templates))
    (tmp_path / "ruler" / "templates_and_tasks.json").write_text(json.dumps({"noise": NOISE}))
    return tmp_path


def write(folder, name, *records):
    path = folder / "infinitebench" / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"id": 0, "context": BOOK, "input": "", **r}) + "\n" for r in records))


def score(name, output, *gold):
    sample = Sample("x", array("i", [1, 2]), 1, answers=gold, meta={"set": name})
    return InfiniteBench().judge(sample, output).score


@pytest.mark.parametrize("templates", ["chat", "base"])
@pytest.mark.parametrize("name", SYNTHETIC)
def test_generated_prompts_have_the_size(made, tokenizer, name, templates):
    task = InfiniteBench(sets=name, size=2000, templates=templates)
    samples = task.samples(Setting(tokenizer, 2100, data=made))
    lengths = [len(sample.ids) for sample in samples]
    assert max(lengths) <= 2000
    assert min(lengths) > 2000 - 120  # a pair
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        end = tokenizer.decode(sample.ids[sample.context :])
        assert end.startswith("\n\n")
        assert end.endswith(" It is") == (templates == "base")
    assert len(samples) == {"kv_retrieval": 500, "math_find": 350}.get(name, len(samples))


@pytest.mark.parametrize(("name", "digits"), [("passkey", 5), ("number_string", 10)])
def test_keys_are_at_their_depth(made, tokenizer, name, digits):
    samples = InfiniteBench(sets=name, size=1500).samples(Setting(tokenizer, data=made))
    for sample in samples:
        (key,) = sample.answers
        assert len(key) == digits
        assert key.isdigit()
        lines = tokenizer.decode(sample.ids[: sample.context]).split("\n")[2:]
        at = next(number for number, line in enumerate(lines) if key in line)
        assert lines.count(NOISE) == sample.meta["units"] == len(lines) - 1
        assert at == round(sample.meta["depth"] * sample.meta["units"])
        if name == "number_string":
            assert sum(a == b for a, b in itertools.pairwise(key)) >= 5
    depths = [sample.meta["depth"] for sample in samples]
    assert {depths.count(depth) for depth in depths} == {10}
    assert {0, 1} <= set(depths)
    assert len({sample.answers for sample in samples}) > 0.9 * len(samples)


def test_the_pair_asked_for_is_in_the_list(made, tokenizer):
    samples = InfiniteBench(sets="kv_retrieval", size=3000).samples(Setting(tokenizer, data=made, limit=40))
    for sample in samples:
        _, context, question = tokenizer.decode(sample.ids).split("\n\n")
        pairs = json.loads(context)
        key = question.split('"')[1]
        assert pairs[key] == sample.answers[0]
        assert list(pairs).index(key) == int(sample.meta["depth"] * sample.meta["units"])
    assert len({sample.meta["depth"] for sample in samples}) == 40


def test_numbers_are_found(made, tokenizer):
    samples = InfiniteBench(sets="math_find", size=900).samples(Setting(tokenizer, data=made))
    for sample in samples:
        prefix, context, question = tokenizer.decode(sample.ids).split("\n\n")
        numbers = json.loads(context)
        kind = sample.meta["find"]
        assert f"the {kind} number" in prefix
        assert f"The {kind} number" in question
        assert float(sample.answers[0]) == find(numbers, kind)
    assert {sample.meta["find"] for sample in samples[:40]} == set(FINDS)  # a limit takes some of all


def test_find():
    numbers = [5, 5, 1, 2, 2, 9]
    assert [find(numbers, kind) for kind in FINDS] == [9, 5, 2, 1, 2, 5, statistics.median(numbers)]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_generated_samples_are_deterministic_and_a_limit_takes_the_first(made, tokenizer, name):
    task, others = InfiniteBench(sets=name, size=1200), InfiniteBench(sets="synthetic", size=1200)
    whole = task.samples(Setting(tokenizer, data=made))
    assert task.samples(Setting(tokenizer, data=made, limit=7)) == whole[:7]
    among = others.samples(Setting(tokenizer, data=made, limit=7))
    assert [s for s in among if s.meta["set"] == name] == whole[:7]
    assert task.samples(Setting(tokenizer, data=made, limit=7, seed=1)) != whole[:7]


def test_sizes_that_cannot_be(made, tokenizer):
    with pytest.raises(ValueError, match=r"passkey takes at least .* got size=60"):
        InfiniteBench(size=60).samples(Setting(tokenizer, data=made))
    with pytest.raises(ValueError, match=r"size=TOKENS makes it shorter.* window of 500"):
        InfiniteBench(size=600).samples(Setting(tokenizer, 500, data=made))


def test_files_come_first(made, tokenizer):
    write(made, "passkey", {"input": "What is it?", "answer": ["12345"]})
    (sample,) = InfiniteBench(sets="passkey").samples(Setting(tokenizer, data=made))
    assert tokenizer.decode(sample.ids) == f"Read.\n\n{BOOK}\n\nWhat is it?"
    assert sample.answers == ("12345",)
    assert len(InfiniteBench(sets="passkey", size=900).samples(Setting(tokenizer, data=made, limit=4))) == 4


def test_questions_of_a_book_share_its_context(made, tokenizer):
    books = [BOOK, BOOK.upper()]
    texts = ["Why?", "Who was it, and when was it?", "How?", "What?"]
    write(made, "longbook_qa_eng", *[{"context": books[i % 2], "input": q, "answer": [q]} for i, q in enumerate(texts)])
    task = InfiniteBench(sets="longbook_qa_eng")
    samples = task.samples(Setting(tokenizer, 540, data=made))
    assert [s.id for s in samples] == [f"longbook_qa_eng/{number}" for number in range(4)]
    for sample, question in zip(samples, texts, strict=True):
        assert tokenizer.decode(sample.ids).endswith(f"\n\nQuestion: {question}")
        assert sample.cut_from == len(f"Read.\n\n{BOOK}\n\nQuestion: {question}")
    for first, second in ((0, 2), (1, 3)):
        assert samples[first].ids[: samples[first].context] == samples[second].ids[: samples[second].context]
    assert len(samples[1].ids) == 500  # the longest
    whole = f"Read.\n\n{books[1]}\n\nQuestion: {texts[1]}"
    assert tokenizer.decode(samples[1].ids) == whole[:250] + whole[-250:]
    assert task.samples(Setting(tokenizer, 540, data=made, limit=3)) == samples[:3]


def test_fields_of_other_sets(made, tokenizer):
    options = ["one", "two", "three", "four"]
    write(made, "code_debug", {"options": options, "answer": ["three", "C"]})
    write(made, "longbook_choice_eng", {"options": options, "answer": ["two"], "input": "Which?"})
    write(made, "code_run", {"input": "Give the value of func_12(-3).", "answer": [7]})
    write(made, "math_calc", {"answer": [[1, -2]]})
    names = ("code_debug", "longbook_choice_eng", "code_run", "math_calc")
    debug, choice, run, calc = InfiniteBench(sets=names).samples(Setting(tokenizer, data=made))
    assert tokenizer.decode(debug.ids).endswith("A. one B. two C. three D. four")
    assert debug.answers == ("three", "C")
    assert choice.answers == ("two", "B")
    assert tokenizer.decode(run.ids).startswith("There is func_12.")
    assert tokenizer.decode(run.ids).endswith("What is func_12(-3)?")
    assert run.answers == ("7",)
    assert calc.answers == ("1", "-2")


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("code_debug", {"answer": ["x"]}, "record 1, has no field 'options'"),
        ("code_debug", {"answer": ["x"], "options": ["y"] * 4}, "the answer 'x', which is none of its options"),
        ("code_run", {"answer": ["x"]}, "no call such as"),
        ("math_find", {"answer": [1]}, 'does not ask for "The'),
        ("longbook_qa_eng", {}, "record 1, has no field 'answer'"),
        ("longbook_qa_eng", {"answer": []}, "record 1, has no answer"),
    ],
)
def test_broken_records(made, tokenizer, name, broken, message):
    write(made, name, broken)
    with pytest.raises(ValueError, match=message):
        InfiniteBench(sets=name).samples(Setting(tokenizer, data=made))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("infinitebench:sets=passkeys", "did you mean 'passkey'"),
        ("infinitebench:templates=llama", "templates is one of chat, base; got 'llama'"),
        ("infinitebench:size=0", "size is .* got 0"),
        ("infinitebench:sets=code_run,size=4000", "code_run is read from a file"),
    ],
)
def test_wrong_options(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_task(spec)


def test_missing_files(made, tokenizer):
    with pytest.raises(ValueError, match=r"there is no longbook_sum_eng.jsonl in .* can be generated"):
        InfiniteBench(sets="longbook_sum_eng").samples(Setting(tokenizer, data=made))
    with pytest.raises(ValueError, match="no folder '/no/such'"):
        InfiniteBench(source="/no/such").samples(Setting(tokenizer, data=made))


@pytest.mark.parametrize(
    ("name", "gold", "scores"),
    [
        ("passkey", ["01234"], {"It is 01234.": 1, "1 and 01234": 0, "1234": 0, "": 0}),
        ("number_string", ["0011223344"], {" 0011223344": 1, "00112233445": 0}),
        ("kv_retrieval", ["ab-1"], {'{"k": "ab-1"}': 1, "the value:ab-1!": 1, "xab-1": 0, "": 0}),
        ("math_find", ["49.5"], {"49.5": 1, "It is 49.5, not 3": 1, "49": 0, "none": 0}),
        ("math_find", ["98"], {"98.": 1, "The 2nd is 98": 0}),
        ("math_calc", ["1", "4", "-2", "7"], {"[1, 4, -2, 7]": 1, "1 4 2 7": 0.5, "2, 4": 0, "": 0, "1, 4, -2": 0.75}),
        ("code_run", ["-5"], {"The value is: -5.": 1, "-5 is it": 0, "5": 0, "": 0, "it is x": 0}),
        (
            "code_debug",
            ["load_it", "B"],
            {"B. load_it": 1, "B: it": 1, "The answer is: B": 1, "The bug is:\n`load_it`": 1, "A. x": 0, "B": 0}
            | {"The answer is: C": 0, "The answer is:": 0, "": 0, "answer: Option B": 1},
        ),
        ("longbook_qa_eng", ["the red cat", "a dog"], {"Red cat.": 1, "dog": 1, "red dog": 2 / 3, "": 0}),
        ("longbook_qa_chn", ["红色的猫"], {"红色的猫。": 1, "红猫": 2 / 3, "狗": 0, "": 0}),
        (
            "longbook_choice_eng",
            ["The red cat", "C"],
            {"C": 1, "C. dog": 1, "The red cat": 1, "I think the answer is: C": 1, "so the answer is The red cat.": 1}
            | {"it must be C or D": 1, "it must be D or C": 0, "A": 0, "": 0, "the option is D": 0, "no idea": 0},
        ),
        ("longdialogue_qa_eng", ["ANNA", "Anna Lee"], {"It is Anna.": 1, "anna:": 1, "Annabel": 0, "": 0}),
        ("longdialogue_qa_eng", ["DR. LEE"], {"dr. lee, of course": 1, "Lee": 0}),
    ],
)
def test_scores(name, gold, scores):
    for output, wanted in scores.items():
        assert score(name, output, *gold) == pytest.approx(wanted), output


def test_summaries_are_scored_by_lines():
    """ROUGE-Lsum takes the union of the matches of lines, so their order is free."""
    gold = "the cat sat down\na dog ran away"
    assert score("longbook_sum_eng", gold, gold) == 1
    assert score("longbook_sum_eng", "a dog ran away\nthe cat sat down", gold) == 1
    assert 0 < score("longbook_sum_eng", "the cat ran", gold) < 1
    assert score("longbook_sum_eng", "", gold) == 0


def test_sets_weigh_the_same():
    rows = [{"meta": {"set": name}, "score": s} for name, s in (("passkey", 1), ("code_run", 0), ("code_run", 0))]
    assert InfiniteBench().total(rows) == 50


@needs_data
@pytest.mark.parametrize("templates", ["chat", "base"])
def test_with_a_real_tokenizer_and_the_official_templates(templates):
    real = transformers.AutoTokenizer.from_pretrained(longwave.models.smollm2())
    samples = InfiniteBench(size=1500, templates=templates).samples(Setting(real, 2048, data=DATA, limit=4))
    assert len(samples) == 16
    for sample in samples:
        assert 1500 - 90 < len(sample.ids) <= 1500
        text = real.decode(sample.ids)
        assert ("<|im_start|>" in text) == (templates == "chat")
        assert sample.answers[0] in text or sample.meta["set"] == "math_find"
        assert real.decode(sample.ids[sample.context :]).startswith("\n\n")
