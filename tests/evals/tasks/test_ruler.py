import json
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import transformers

from longwave.checks import read_json
from longwave.evals import data
from longwave.evals.task import Sample, Setting
from longwave.evals.tasks import parse_task
from longwave.evals.tasks.ruler import NAMES, Ruler, effective_length, fit, means, weighted
from longwave.evals.tasks.ruler.counting import MORE_WORDS, CommonWords, zeta
from longwave.evals.tasks.ruler.maker import Source, Template, words
from longwave.evals.tasks.ruler.niah import DEPTHS, listing
from longwave.models import smollm2
from tests.conftest import DATA

NIAH = [name for name in NAMES if name.startswith("niah")]
LENGTHS = (1100, 4096)
# tokens that one step of the protocol removes at 4096, with room for what prompts differ by: 500 words, 25 lines,
# 10 lines, 10 words three times over, 128 counted words, 10 paragraphs
STEP_TOKENS = {**dict.fromkeys(NIAH, 800), "niah_multikey_3": 2400, "vt": 300, "cwe": 500, "fwe": 800}
STEP_TOKENS |= {"qa_1": 2500, "qa_2": 2500}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
MULTIKEY_3 = re.compile(
    rf"(?P<first>[^\n]*)\n(?P<lines>(?:[^\n]*\n)+)(?P<ask>[^\n]*?)(?P<key>{UUID})(?P<between>[^\n]*?)(?P=key)(?P<end>[^\n]*)"
)
NEEDLE = re.compile(rf"(One of the special magic uuids for )({UUID})( is: )({UUID})(\.)")
NUMBER_NEEDLE = re.compile(r"One of the special magic numbers for ([^:]+?) is: (\d{7})\.")
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")


@pytest.fixture(scope="module")
def real():
    return transformers.AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def samples(real):
    """task -> length -> samples."""
    made = {name: {length: [] for length in LENGTHS} for name in NAMES}
    if DATA.exists():
        for sample in Ruler(lengths=LENGTHS).samples(Setting(real, data=DATA, limit=3)):
            made[sample.meta["task"]][sample.meta["length"]].append(sample)
    return made


@pytest.fixture(scope="module")
def make(real):
    def some(tasks="all", lengths=1100, limit=2, seed=42, window=None, chat=False, folder=DATA, **options):
        setting = Setting(real, window, seed, limit, folder, chat=chat)
        return Ruler(lengths=lengths, tasks=tasks, **options).samples(setting)

    return some


def user_text(real, sample):
    """The prompt without the chat template."""
    return re.search(r"<\|im_start\|>user\n(.*)<\|im_end\|>", real.decode(sample.ids), re.DOTALL)[1]


def every(samples, names=NAMES, lengths=LENGTHS):
    return [sample for name in names for length in lengths for sample in samples[name][length]]


@needs_data
def test_all_tasks_and_lengths(samples):
    made = every(samples)
    assert len(made) == 13 * 2 * 3
    assert len({sample.id for sample in made}) == len(made)
    assert {sample.max_new_tokens for sample in made} == {128, 30, 120, 50, 32}
    json.dumps([dict(sample.meta) for sample in made])


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_kept(samples, name):
    for length in LENGTHS:
        for sample in samples[name][length]:
            left = length - len(sample.ids) - sample.max_new_tokens
            assert 0 <= left <= STEP_TOKENS[name] * min(1, length / 4096)


@needs_data
def test_gold_strings_are_in_the_context(real, samples):
    for sample in every(samples):
        said = real.decode(sample.ids[: sample.context]).lower()
        found = [answer.lower() in said for answer in sample.answers]
        assert any(found) if sample.meta["task"].startswith("qa") else all(found)


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_question_and_answer_opening_come_after_the_context(real, samples, name):
    source = Source(Setting(real, data=DATA))
    template = source.template(source.parameters(name)["task"])
    for sample in every(samples, [name]):
        after = real.decode(sample.ids[sample.context :])
        opening, _, rest = after.partition("<|im_end|>\n<|im_start|>assistant\n")
        # the words that no value changes, in both forms of the needle tasks
        forms = [template, template.singular()]
        assert opening.lstrip("\n").split(" ")[0] in template.question
        assert any(opening.startswith(form.question.split("{")[0]) for form in forms)
        assert any(rest.startswith(form.prefix.split("{")[0]) for form in forms)
        assert sample.answers[0] not in rest


@needs_data
def test_same_format_as_rulers_own_sample(make):
    references = data.read_records(DATA / "ruler/sample_niah_multikey_3_4096.first20.jsonl")
    ours = make("niah_multikey_3", lengths=4096, limit=20)
    assert len(references) == len(ours) == 20
    frames = set()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    texts = [(r["input"], r["outputs"]) for r in references] + [(tokenizer.decode(s.ids), s.answers) for s in ours]
    for text, gold in texts:
        whole = MULTIKEY_3.fullmatch(text)
        lines = [NEEDLE.fullmatch(line) for line in whole["lines"].removesuffix("\n").split("\n")]
        values = {line[2]: line[4] for line in lines}
        assert len(values) == len(lines) > 10
        assert [values[whole["key"]]] == list(gold)
        frames |= {
            (whole["first"], whole["ask"], whole["between"], whole["end"], *line.group(1, 3, 5)) for line in lines
        }
    assert len(frames) == 1


@needs_data
def test_counts_of_needles(real, samples):
    counts = {"niah_single_2": (1, 1, 1), "niah_multikey_1": (4, 4, 1)}  # keys, values, answers
    counts |= {"niah_multivalue": (1, 4, 4), "niah_multiquery": (4, 4, 4)}
    for name, expected in counts.items():
        for sample in every(samples, [name]):
            found = NUMBER_NEEDLE.findall(user_text(real, sample))
            keys, values = {key for key, _ in found}, {value for _, value in found}
            assert (len(keys), len(values), len(sample.answers)) == expected
            question = real.decode(sample.ids[sample.context :])
            asked = {key for key, value in found if value in sample.answers}
            assert all(key in question for key in asked)
            assert len(set(sample.answers)) == len(sample.answers)


@needs_data
def test_needles_stand_at_distinct_depths_in_order(real, samples):
    for sample in every(samples, ["niah_multivalue", "niah_multiquery"]):
        depths = sample.meta["depths"]
        assert len(set(depths)) == 4
        assert set(depths) <= set(DEPTHS)
        text = user_text(real, sample)
        places = [text.index(answer) for answer in sample.answers]
        assert sorted(range(4), key=places.__getitem__) == sorted(range(4), key=depths.__getitem__)
        body = text.split("\n")[1]
        sentences = len(re.split(r"(?<=[.!?]) ", NUMBER_NEEDLE.sub("", body).strip().replace("  ", " ")))
        for answer, depth in zip(sample.answers, depths, strict=True):
            before = NUMBER_NEEDLE.sub("", body[: body.index(answer)].rpartition("One of the special")[0])
            passed = re.split(r"(?<=[.!?]) ", before.strip().replace("  ", " ")) if before.strip() else []
            assert len(passed) == int(sentences * depth / 100)
    assert len(DEPTHS) == len(set(DEPTHS)) == 40
    assert (DEPTHS[0], DEPTHS[-1]) == (0, 100)


@needs_data
def test_singular_and_plural(real, samples):
    for name in NIAH:
        text = real.decode(samples[name][1100][0].ids)
        many = name in ("niah_multivalue", "niah_multiquery")
        first = re.search(r"<\|im_start\|>user\n(\S+)", text)[1]
        assert (first, text.split()[-1]) == (("Some", "are") if many else ("A", "is"))
    asked = real.decode(samples["niah_multiquery"][1100][0].ids).split("magic numbers for ")[-1]
    assert re.match(r"[^,]+, [^,]+, [^,]+, and [^,]+ mentioned", asked)
    assert [listing(list(names)) for names in ("a", "ab", "abc")] == ["a", "a, and b", "a, b, and c"]


@needs_data
def test_vt_has_a_chain_and_a_solved_example(real, samples):
    examples = set()
    for sample in every(samples, ["vt"]):
        solved, task = re.split(r"\n\n(?=Memorize and track)", real.decode(sample.ids).split("user\n")[1])
        for text, letters in ((solved, 3), (task, 5)):
            roots = re.findall(r"^VAR ([A-Z]+) = (\d{5})$", text, re.MULTILINE)
            hops = re.findall(r"^VAR ([A-Z]+) = VAR ([A-Z]+) $", text, re.MULTILINE)
            chain = [roots[0][0], *(later for later, _ in hops)]
            assert len(roots) == 1
            assert [earlier for _, earlier in hops] == chain[:-1]
            assert len(set(chain)) == 5
            assert {len(name) for name in chain} == {letters}
            assert text.count(roots[0][1]) == 3  # the statement, the question, the answer's opening
            assert "5 variables" in text
            if letters == 5:
                assert tuple(chain) == sample.answers
            else:
                assert solved.endswith(" ".join(chain))
                assert len(real(solved).input_ids) <= 500 + 5 * 4
                examples.add(tuple(chain))
    assert len(examples) == 6  # another one each time


def numbered_words(text):
    found = re.findall(r"(\d+)\. (.+?)(?=(?: \d+\. )|\n|$)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return Counter(word for _, word in found)


@needs_data
@pytest.mark.parametrize(("length", "times", "example"), [(4096, (30, 3), (10, 3, 40)), (1100, (6, 1), (3, 1, 20))])
def test_cwe_counts(real, samples, length, times, example):
    for sample in samples["cwe"][length]:
        shown, task = re.split(r"\n(?=Below is)", user_text(real, sample))
        counts = numbered_words(task.split("\n")[1])
        assert set(counts.values()) == set(times)
        assert {word for word, count in counts.items() if count == times[0]} == set(sample.answers)
        counts = numbered_words(shown.split("\n")[1])
        common = {word for word, count in counts.items() if count == example[0]}
        assert (set(counts.values()), len(counts), len(common)) == ({example[0], example[1]}, example[2], 10)
        assert set(numbered_words(shown.split("are: ")[1])) == common


@needs_data
def test_cwe_takes_rare_words_where_the_list_ends(real):
    source = Source(Setting(real, data=DATA))
    maker = CommonWords(source, source.parameters("cwe"), 131072)
    short, long = len(maker.words), len(maker.words) + 1
    known = set((DATA / MORE_WORDS).read_text().split())
    assert set(maker.draw(random.Random(1), long, 0).answers) <= known
    assert set(maker.draw(random.Random(1), short, 0).answers) <= set(maker.words)
    assert short > 8000


@needs_data
def test_fwe_counts(real, samples):
    for sample in every(samples, ["fwe"]):
        text = re.search(r"coded words\. (.*)\nQuestion", user_text(real, sample))[1]
        counts = Counter(text.split(" "))
        ranked = counts.most_common()
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == list(sample.answers)
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        ranks = sample.meta["length"] // 50
        shown = [count for _, count in ranked] + [0] * (ranks - len(ranked))

        def expected(total, ranks=ranks):
            return [math.floor(total / (k * k * math.pi**2 / 6)) for k in range(1, ranks + 1)]

        assert any(expected(total) == shown for total in range(len(text.split(" ")), 2 * len(text.split(" "))))


@pytest.mark.parametrize(("alpha", "value"), [(2.0, math.pi**2 / 6), (4.0, math.pi**4 / 90), (1.5, 2.612375348685488)])
def test_zeta(alpha, value):
    assert zeta(alpha) == pytest.approx(value, rel=1e-9)


@needs_data
@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_qa_documents(real, samples, name):
    article = {}
    for number, entry in enumerate(read_json(DATA / "qa_sources/xquad.en.json", "questions")["data"]):
        article |= {paragraph["context"]: number for paragraph in entry["paragraphs"]}
    for length in LENGTHS:
        for sample in samples[name][length]:
            text = user_text(real, sample).split("given documents.\n\n", 1)[1].rsplit("\n\nAnswer the question", 1)[0]
            numbers = re.findall(r"^Document (\d+):$", text, re.MULTILINE)
            documents = [part.strip() for part in re.split(r"^Document \d+:\n", text, flags=re.MULTILINE)[1:]]
            assert list(map(int, numbers)) == list(range(1, len(documents) + 1))
            assert len(set(documents)) == len(documents) > 1
            assert any(answer.lower() in text.lower() for answer in sample.answers)
            if name == "qa_1":
                from_articles = {article[document] for document in documents}
                assert (len(from_articles) == 1) == (len(documents) <= 5)  # an article has five paragraphs
    assert {sample.meta["source"] for sample in every(samples, [name])} == {"xquad" if name == "qa_1" else "nq"}


@needs_data
def test_limit_choice_of_tasks_and_lengths_change_no_sample(make):
    some = ("niah_single_2", "vt", "fwe", "qa_1")
    whole = {s.id: s for s in make(some, lengths=(1000, 900), limit=3)}
    alone = [s for name in some for s in make(name, lengths=900, limit=1)]
    assert [s.id for s in alone] == [f"{name}/900/0" for name in some]
    assert all(whole[s.id] == s for s in alone)
    assert make(some, lengths=1000, limit=None, repeats=2) == [
        s for s in whole.values() if s.id.endswith(("1000/0", "1000/1"))
    ]
    assert all(a.ids != b.ids for a, b in zip(alone, make(some, lengths=900, limit=1, seed=43), strict=False))


@pytest.mark.parametrize("slope", [1, 7])
@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("most", [None, 60])
def test_fit_finds_the_largest_size(slope, least, most):
    units = SimpleNamespace(least=least, most=most, units="units")
    for length in range(10 + slope * least, 10 + slope * 60):
        assert fit(lambda size: 10 + slope * size, length, units, "x") == (length - 10) // slope
    assert fit(lambda size: 10 + slope * size, 9 + slope * least, units, "x") is None


@needs_data
@pytest.mark.parametrize("name", ["niah_multikey_1", "niah_multikey_3", "vt", "cwe", "fwe", "qa_2"])
def test_a_length_too_short_names_one_that_works(make, name):
    with pytest.raises(ValueError, match=rf"a length of 250 tokens is too short for ruler's {name}") as caught:
        make(name, lengths=250, limit=10)
    enough = int(re.search(r"use (\d+) or more", str(caught.value))[1])
    assert len(make(name, lengths=enough, limit=10)) == 10
    with pytest.raises(ValueError, match="too short"):
        make(name, lengths=enough - 128, limit=10)


@needs_data
def test_too_few_units_or_questions(make, tmp_path):
    with pytest.raises(ValueError, match=r"all 240 paragraphs of qa_1 take \d+ tokens, too few for a length of 65536"):
        make("qa_1", lengths=65536)
    with pytest.raises(ValueError, match="qa_1 has 1190 questions, fewer than 1191"):
        make("qa_1", limit=None, repeats=1191)
    (tmp_path / "hay.txt").write_text("Little hay. " * 50)
    with pytest.raises(ValueError, match="all 100 words of the haystack of niah_single_2 take"):
        make("niah_single_2", haystack=str(tmp_path / "hay.txt"))


@needs_data
def test_a_model_whose_window_is_too_small(make):
    with pytest.raises(ValueError, match="ruler's niah_single_1 at 1100"):
        make("niah_single_1", window=1099)
    assert make("niah_single_1", window=1100)


def test_missing_data(make, tmp_path):
    with pytest.raises(ValueError, match="give --data FOLDER"):
        make("vt", folder=None)
    with pytest.raises(ValueError, match="which does not exist"):
        make("vt", folder=tmp_path)
    (tmp_path / "ruler").mkdir()
    texts = tmp_path / "ruler/templates_and_tasks.json"
    texts.write_text("{")
    with pytest.raises(ValueError, match=r"templates_and_tasks\.json:1 is not JSON"):
        make("vt", folder=tmp_path)
    texts.write_text('{"tasks": {}}')
    with pytest.raises(ValueError, match="has no field 'vt'"):
        make("vt", folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "niah_singel_1"}, "did you mean 'niah_single_1'"),
        ({"tasks": ("vt", "vt")}, "'vt' more than once"),
        ({"lengths": (4096, "8k")}, "lengths are ints"),
        ({"lengths": 0}, "at least 1; got 0"),
        ({"repeats": 0}, "repeats is a whole number, at least 1; got 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Ruler(**options)


def test_spec_and_columns():
    task = parse_task("ruler:tasks=vt,cwe,lengths=4096,8192,repeats=50")
    assert (task.tasks, task.lengths, task.repeats) == (("vt", "cwe"), (4096, 8192), 50)
    assert [len(names) for names in Ruler.groups.values()] == [8, 1, 2, 2]
    assert Ruler().tasks == tuple(NAMES)


@pytest.mark.parametrize(
    ("name", "answers", "output", "score", "parsed"),
    [
        ("niah_multivalue", ("123", "456", "789", "000"), " 456, 123 and 12 3", 0.5, ["123", "456"]),
        ("niah_single_3", ("ab-CD",), "AB-cd", 1.0, ["ab-CD"]),
        ("niah_single_1", ("123",), "", 0.0, []),
        ("vt", ("ABCDE", "FGHIJ"), "abcde fghij klmno", 1.0, ["ABCDE", "FGHIJ"]),
        ("cwe", ("ad hoc", "cat"), "1. ad\thoc 2. catalog", 0.5, ["cat"]),  # a control character is a new line
        ("fwe", ("aa\nb",), "aa\x00b", 1.0, ["aa\nb"]),
        ("qa_1", ("Paris", "in Paris", "France"), "It was in paris.", 1.0, ["Paris", "in Paris"]),
        ("qa_2", ("Paris", "France"), "Rome", 0.0, []),
    ],
)
def test_judge(name, answers, output, score, parsed):
    judged = Ruler().judge(Sample("x", [1, 2], 1, 8, answers, {"task": name}), output)
    assert (judged.score, judged.parsed) == (score, parsed)


def test_summary():
    def rows(length, task, scores):
        return [{"score": score, "meta": {"length": length, "task": task}} for score in scores]

    measured = rows(8192, "vt", [0.5]) + rows(4096, "vt", [1, 1, 1, 0.6]) + rows(4096, "cwe", [0.86])
    with pytest.raises(ValueError, match="different tasks"):
        means(measured)
    by_length = means([*measured, *rows(8192, "cwe", [0.7, 0.9])])
    assert by_length == {4096: pytest.approx(88.0), 8192: pytest.approx(65.0)}
    assert list(by_length) == [4096, 8192]
    assert weighted({8: 30.0, 2: 90.0, 4: 60.0}) == pytest.approx(((90 + 120 + 90) / 6, (270 + 120 + 30) / 6))
    assert effective_length(by_length) == 4096
    assert effective_length({4096: 85.6, 8192: 85.59, 16384: 86.0}) == 16384
    assert effective_length(by_length, threshold=90) is None


def test_words_of_wonderwords():
    assert all(len(words(kind)) > 900 for kind in ("noun", "adjective", "verb"))
    assert all(word == word.strip() != "" for kind in ("noun", "adjective") for word in words(kind))


def test_template_keeps_braces_of_the_context():
    drawn = Template("a {x}\n", "\nb {x}?", " c {x}", 5).fill("{x} {y}", ["z"], {}, x=1)
    assert (drawn.prompt, drawn.question, drawn.prefix) == ("a 1\n{x} {y}\nb 1?", "\nb 1?", " c 1")
