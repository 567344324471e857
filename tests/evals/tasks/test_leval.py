import json
from array import array

import pytest
import transformers

import longwave.models
from longwave.evals.metrics import rouge_scores
from longwave.evals.task import Sample, Setting
from longwave.evals.tasks import parse_task
from longwave.evals.tasks.leval import CLOSED, SCORED, LEval, choice_score, parse_choice, parse_number
from tests.conftest import DATA

needs_data = pytest.mark.skipif(not (DATA / "leval").exists(), reason=f"no evaluation data at {DATA}")
SYSTEMS = {  # ours, with the conditions of the official ones
    "'gsm' in file_name": "Count.",
    "'topic' in file_name": "Remember.",
    "'coursera' in file_name": "Name letters.",
    "'sci_fi' in file_name": "True or false.",
    "'exam' in args.metric": "Name a letter.",
    "else": "Follow.",
}
TEXT = " ".join(f"word{number}" for number in range(60))


def record(instructions=("Why?", "Which of these is it?"), outputs=("B", "A"), evaluation="exam", text=TEXT):
    return {"input": text, "instructions": list(instructions), "outputs": list(outputs), "evaluation": evaluation}


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def made(tmp_path):
    """A data folder with two closed sets and two open ones."""
    write(tmp_path / "leval" / "closed" / "tpo.jsonl", record(), record(text=TEXT.upper()))
    write(tmp_path / "leval" / "closed" / "gsm100.jsonl", record(["How many?"], ["3"]))
    write(
        tmp_path / "leval" / "open" / "financial_qa.jsonl",
        record(outputs=["by far", "no"], evaluation="f1"),
        record(evaluation="LLM"),
    )
    write(tmp_path / "leval" / "open" / "news_summ.jsonl", record(["Sum up."], ["a b c"], evaluation="rouge"))
    (tmp_path / "leval" / "system_prompts.json").write_text(json.dumps(SYSTEMS))
    return tmp_path


def judged(name, gold, output, evaluation="exam", **meta):
    meta = {"set": name, "evaluation": evaluation, **meta}
    return LEval().judge(Sample("x", array("i", [1, 2]), 1, answers=(gold,), meta=meta), output)


def test_prompts(made, tokenizer):
    samples = {s.id: s for s in LEval(sets="all").samples(Setting(tokenizer, data=made))}
    assert list(samples) == [
        *("tpo/0/0", "tpo/0/1", "tpo/1/0", "tpo/1/1", "gsm100/0/0"),
        *("financial_qa/0/0", "financial_qa/0/1", "news_summ/0/0"),
    ]
    rule = "Please directly give the answer without any additional output or explanation "
    text = {id: tokenizer.decode(s.ids) for id, s in samples.items()}
    assert text["tpo/0/0"] == f"Name a letter.\n\nDocument is as follows. {TEXT} \nQuestion: Why?.  {rule}\nAnswer:"
    assert text["gsm100/0/0"] == f"Count.\n\n{TEXT}\n\nHow many?"
    assert text["financial_qa/0/0"] == (
        f"Follow.\n\nDocument is as follows. {TEXT} Instruction: Why? \nAnswer this question with 2 words."
    )
    assert text["news_summ/0/0"].endswith("\nAnswer this question with 3 words.")
    for sample in samples.values():
        assert tokenizer.decode(sample.ids[: sample.context]).lower().endswith(TEXT)
        assert sample.cut_from is None


def test_choosing_sets(made, tokenizer):
    setting = Setting(tokenizer, data=made)

    def names(sets):
        return {s.meta["set"] for s in LEval(sets=sets).samples(setting)}

    assert names("closed") == {"tpo", "gsm100"}
    assert names("open") == {"financial_qa", "news_summ"}
    assert names("gsm100") == {"gsm100"}
    with pytest.raises(ValueError, match="no set 'quality'"):
        names(("gsm100", "quality"))
    with pytest.raises(ValueError, match="has none of the sets coursera"):
        LEval(source=str(made)).samples(setting)
    direct = LEval(source=str(made / "leval" / "open"), sets="all").samples(setting)
    assert direct == LEval(sets="open").samples(setting)


def test_a_limit_gives_a_prefix_of_every_set(made, tokenizer):
    whole = LEval(sets="all").samples(Setting(tokenizer, data=made))
    for limit in (1, 3):
        part = LEval(sets="all").samples(Setting(tokenizer, data=made, limit=limit))
        wanted = [s for name in dict.fromkeys(s.meta["set"] for s in whole) for s in of(whole, name)[:limit]]
        assert part == wanted


def of(samples, name):
    return [s for s in samples if s.meta["set"] == name]


@pytest.mark.parametrize("window", [900, 1000])
def test_documents_lose_words_at_their_end(made, tokenizer, window):
    first, second = LEval(sets="tpo").samples(Setting(tokenizer, window, data=made))[:2]
    assert first.ids[: first.context] == second.ids[: second.context]
    kept = tokenizer.decode(first.ids[: first.context]).partition("as follows. ")[2]
    assert TEXT.startswith(kept + " ")
    longest = max(len(first.ids), len(second.ids)) + 512
    assert window - len("word10 ") <= longest <= window
    assert first.cut_from == len(first.ids) + len(TEXT) - len(kept)


def test_sci_fi_is_asked_with_and_without_the_document(tmp_path, made, tokenizer):
    question = "Do cats fly, based on the world described in the document."
    write(tmp_path / "leval" / "closed" / "sci_fi.jsonl", record([question], ["True [fact: False]"]))
    loyal, fact = LEval(sets="sci_fi").samples(Setting(tokenizer, data=made))
    assert (loyal.id, fact.id) == ("sci_fi/0/0", "sci_fi/0/0/fact")
    assert TEXT in tokenizer.decode(loyal.ids)
    assert question in tokenizer.decode(loyal.ids)
    alone = tokenizer.decode(fact.ids)
    assert alone.startswith("True or false.\n\n \nQuestion: Do cats fly, based on the real-world knowledge and facts")
    assert "word1" not in alone
    for output, loyalty, truth in (("True", 1, 0), ("It is false. True", 0, 1), ("yes", 0, 0)):
        assert LEval().judge(loyal, output).score == loyalty
        assert LEval().judge(fact, output).score == truth


@pytest.mark.parametrize(
    ("max_new", "lengths"),
    [("official", [512] * 5), ("short", [10, 512, 128, 128, 512]), (7, [7] * 5)],
)
def test_new_tokens(made, tokenizer, max_new, lengths):
    samples = LEval(sets="all", max_new=max_new).samples(Setting(tokenizer, data=made))
    ids = ("tpo/0/0", "gsm100/0/0", "financial_qa/0/0", "financial_qa/0/1", "news_summ/0/0")
    assert [next(s.max_new_tokens for s in samples if s.id == id) for id in ids] == lengths


@pytest.mark.parametrize(
    ("output", "several", "letters"),
    [
        ("", False, "None"),
        (" \n", True, "None"),
        ("C", False, "C"),
        ("BC", True, "BC"),
        ("the answer is (B) or C", False, "B"),
        ("nothing", False, "A"),
        ("nothing", True, "A"),
        ("DBA and so on", True, "ABD"),
        ("B. tall\nC) small", True, "BC"),
        ("it is B. Question 2: D. none", True, "B"),
        ("B, D", True, "D"),
    ],
)
def test_choices_are_read(output, several, letters):
    assert parse_choice(output, several) == letters


def test_choices_are_scored():
    assert choice_score("AB", "AB") == 1
    assert choice_score("A", "AB") == 0.25
    assert choice_score("AC", "AB") == choice_score("ABC", "AB") == choice_score("None", "A") == 0
    assert judged("quality", "(B) Their end", "B").score == 1
    assert judged("coursera", "AC", "C. four").score == 0.25


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("so 3 + 4 = 7. The answer is 7.", 7),
        ("The answer is $1,250.00 in all\n\nQuestion: 3 cats", 1250),
        ("that makes 12 eggs and $18.\n\nThe 99th", 18),
        ("it costs 2.50", 2.5),
        ("The answer is none", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_numbers_are_read(output, number):
    assert parse_number(output) == number


def test_other_scores():
    assert judged("gsm100", "18", "The answer is 18").score == 1
    assert judged("gsm100", "18", "who knows").score == 0
    assert judged("topic_retrieval_longchat", "The role of art", "It is the Role of  Art, I think.").score == 1
    assert judged("topic_retrieval_longchat", "The role of art", "the role of music").score == 0
    assert judged("multidoc_qa", "for one year", "One year", "f1").score == pytest.approx(0.8)


def test_a_rouge_set_has_the_geometric_mean_of_its_means():
    pairs = [("a cat sat on the mat", "the cat sat on a mat"), ("nothing alike", "other words"), ("a b c", "a b c")]
    rows = []
    for output, gold in pairs:
        one = judged("news_summ", gold, output, "rouge")
        rows.append({"score": one.score, "metrics": dict(one.metrics), "meta": {"set": "news_summ"}})
    scores = [rouge_scores(output, gold, ("rouge1", "rouge2", "rougeL")) for output, gold in pairs]
    product = 1.0
    for kind in ("rouge1", "rouge2", "rougeL"):
        product *= sum(score[kind] for score in scores) / len(scores)
    assert LEval().total(rows) == pytest.approx(100 * product ** (1 / 3))
    assert LEval().total([*rows, {"score": 1.0, "metrics": {}, "meta": {"set": "tpo"}}]) == pytest.approx(
        50 + 50 * product ** (1 / 3)
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("leval:sets=tpoo", "did you mean 'tpo'"),
        ("leval:max_new=0", "max_new is .* got 0"),
        ("leval:max_new=long", "max_new is .* got 'long'"),
        ("leval:source=3", "source is .* got 3"),
    ],
)
def test_wrong_options(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_task(spec)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"instructions": ["Why?"]}, "record 1, has 1 instructions and 2 outputs"),
        ({"input": 3}, "record 1, is malformed"),
        ({"evaluation": None}, "record 1, has no field 'evaluation'"),
    ],
)
def test_broken_records(made, tokenizer, broken, message):
    bad = {key: value for key, value in {**record(), **broken}.items() if value is not None}
    write(made / "leval" / "closed" / "tpo.jsonl", bad)
    with pytest.raises(ValueError, match=message):
        LEval(sets="tpo").samples(Setting(tokenizer, data=made))


def test_missing_data(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="does not exist"):
        LEval().samples(Setting(tokenizer, data=tmp_path))
    with pytest.raises(ValueError, match="no folder '/no/such'"):
        LEval(source="/no/such").samples(Setting(tokenizer, data=tmp_path))


@needs_data
@pytest.mark.parametrize("name", ["coursera", "quality", "tpo", "gsm100", "topic_retrieval_longchat"])
def test_recorded_outputs_give_the_known_scores(name):
    folder = DATA / "leval" / "fixtures" / "gpt4-32k"
    expected = json.loads((folder / "expected_scores.json").read_text())["scores"][name]
    rows = []
    for line in (folder / f"{name}.pred.jsonl").read_text().splitlines():
        known = json.loads(line)
        rows.append({"score": judged(name, known["gt"], known["gpt4-x_pred"]).score, "meta": {"set": name}})
    if isinstance(expected, dict):
        found = [LEval().total(rows[part::3]) for part in range(3)]
        assert found == pytest.approx([expected[part] for part in ("first", "second", "third")], abs=0.01)
    else:
        assert LEval().total(rows) == pytest.approx(expected, abs=0.01)


@needs_data
def test_real_records_share_their_contexts():
    real = transformers.AutoTokenizer.from_pretrained(longwave.models.smollm2())
    setting = Setting(real, 4096, data=DATA, limit=8)
    sets = ("coursera", "tpo", "gsm100", "topic_retrieval_longchat", "scientific_qa", "news_summ")
    samples = LEval(sets=sets, max_new="short").samples(setting)
    families = {}
    for sample in samples:
        families.setdefault(sample.id.rsplit("/", 1)[0], []).append(sample)
        assert len(sample.ids) + sample.max_new_tokens <= 4096
        assert sample.meta["evaluation"] in SCORED
    for id, family in families.items():
        assert len({s.ids[: s.context].tobytes() for s in family}) == 1
        name, number = id.split("/")
        kind = "closed" if name in CLOSED else "open"
        lines = (DATA / "leval" / kind / f"{name}.jsonl").read_text().split("\n")
        document = json.loads(lines[int(number)])["input"]
        context = real.decode(family[0].ids[: family[0].context])
        if family[0].cut_from is None:
            assert context.rstrip().endswith(document.rstrip())
        else:  # ends in the document, after a whole word
            end = document.find(context[-200:]) + 200
            assert end >= 200
            assert document[end].isspace()
    assert {s.meta["set"] for s in samples} == set(sets)
    assert sum(len(family) > 1 for family in families.values()) > 5
    assert {s.cut_from is None for s in samples} == {True, False}
