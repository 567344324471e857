import copy
import gzip
import json
import zipfile

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError

import longwave
from longwave.evals.task import Sample, Setting
from longwave.evals.tasks import get_task, parse_task
from longwave.evals.tasks.longbench import (
    CLASSES,
    CODE,
    E_SETS,
    ENGLISH,
    NO_CHAT,
    NUMBERS,
    SETS,
    TEXT_SCORES,
    LongBench,
    ready_question,
)
from tests.conftest import DATA

MINI = DATA / "longbench" / "mini"
needs_data = pytest.mark.skipif(not MINI.exists(), reason="the evaluation data folder is not here")

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}[model]"
TEMPLATES = {  # ours, in the shape of the official ones
    "qasper": "Read this.\n\nArticle: {context}\n\n Answer from the article above.\n\nQuestion: {input}\n\nAnswer:",
    "trec": "Name the kind.\n{context}\n{input}",
    "triviaqa": "Answer.\n\n{context}\n\n{input}",
    "samsum": "Sum up.\n\n{context}\n\n{input}",
    "lsht": "Name the kind.\n{context}\n{input}",
    "passage_count": "Count.\n{context}\n\nThe count is: ",
    "lcc": "Complete.\n{context}Next:\n",
    "repobench-p": "Complete.\n{context}{input}Next:\n",
}


def record(**changes):
    made = {"input": "Why?", "context": "word " * 40, "answers": ["because"], "length": 40, "all_classes": None}
    return {**made, **changes}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in records)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress((lines if ".jsonl" in path.name else json.dumps(records)).encode()))
    else:
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps(records))


@pytest.fixture
def folder(tmp_path):
    """A data folder with our templates and no sets."""
    config = tmp_path / "longbench" / "config"
    config.mkdir(parents=True)
    (config / "dataset2prompt.json").write_text(json.dumps(TEMPLATES))
    (config / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(TEMPLATES, 10)))
    return tmp_path


@pytest.fixture
def put(folder):
    def put(name, *records, ending=".jsonl", under="longbench/full"):
        write(folder / under / (name + ending), records or [record()])

    return put


@pytest.fixture(scope="session")
def chatty(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="session")
def real():
    return transformers.AutoTokenizer.from_pretrained(longwave.models.smollm2())


def only(task, setting):
    (sample,) = task.samples(setting)
    return sample


def test_the_template_is_filled_and_the_question_is_what_follows_the_context(tokenizer, folder, put):
    put("qasper", record(context="Long text {with} braces."))
    sample = only(LongBench(), Setting(tokenizer, 1000, data=folder))
    question = "\n\n Answer from the article above.\n\nQuestion: Why?\n\nAnswer:"
    assert tokenizer.decode(sample.ids) == "Read this.\n\nArticle: Long text {with} braces." + question
    assert tokenizer.decode(sample.ids[sample.context :]) == question
    assert (sample.id, sample.answers, sample.max_new_tokens) == ("qasper/0", ("because",), 10)
    assert sample.meta == {"set": "qasper", "length": 40}
    assert sample.cut_from is None
    assert not sample.stop_at_newline


def test_first_and_last_half_of_the_ids_stay(tokenizer, folder, put):
    put("qasper")
    whole = only(LongBench(), Setting(tokenizer, None, data=folder))
    sample = only(LongBench(), Setting(tokenizer, None, data=folder, max_tokens=141))
    assert sample.ids == whole.ids[:70] + whole.ids[-70:]
    assert sample.cut_from == len(whole.ids) > 141
    assert tokenizer.decode(sample.ids[sample.context :]).endswith("Question: Why?\n\nAnswer:")


def test_a_question_longer_than_its_half_keeps_its_end(tokenizer, folder, put):
    put("qasper")
    sample = only(LongBench(), Setting(tokenizer, None, data=folder, max_tokens=40))
    assert sample.context == 20
    assert tokenizer.decode(sample.ids[20:]) == "stion: Why?\n\nAnswer:"


def test_the_prompt_is_cut_before_the_chat_template_goes_around_it(chatty, folder, put):
    put("qasper")
    whole = chatty.decode(only(LongBench(), Setting(chatty, None, data=folder, chat=False)).ids)
    sample = only(LongBench(), Setting(chatty, 1000, data=folder, max_tokens=140))
    assert chatty.decode(sample.ids) == "[user]" + whole[:70] + whole[-70:] + "[/][model]"


@pytest.mark.parametrize("max_tokens", [None, 190, 5000])
def test_template_prompt_and_answer_fit_the_window(chatty, folder, put, max_tokens):
    put("qasper", record(context="word " * 400))
    sample = only(LongBench(), Setting(chatty, 200, data=folder, max_tokens=max_tokens))
    assert len(sample.ids) + sample.max_new_tokens == 200
    assert chatty.decode(sample.ids).startswith("[user]Read this.")
    assert chatty.decode(sample.ids).endswith("Answer:[/][model]")


def test_text_that_takes_more_tokens_after_the_cut_is_cut_further(real, folder, put):
    put("qasper", record(context="🙂" * 200))
    whole = real.decode(only(LongBench(), Setting(real, data=folder, chat=False)).ids)
    grown = 0
    for window in range(110, 118):
        setting = Setting(real, window, data=folder, chat=False)
        sample = only(LongBench(), setting)
        once = setting.count(setting.cut_middle(whole, window - 10)[0])
        grown += once > window - 10  # half an emoji at the end of a half becomes another character
        assert len(sample.ids) == (once if once <= window - 10 else setting.count(real.decode(sample.ids)))
        assert len(sample.ids) + 10 <= window
    assert grown > 0


def test_a_window_that_the_answer_fills_is_an_error(chatty, folder, put):
    put("qasper")
    with pytest.raises(ValueError, match="leave no room in this model's window of 25"):
        LongBench().samples(Setting(chatty, 25, data=folder))


@pytest.mark.parametrize("name", TEMPLATES)
def test_few_shot_and_code_prompts_get_no_chat_template(chatty, folder, put, name):
    put(name, record(all_classes=["because", "x"], answers=["7" if name in NUMBERS else "because"]))
    sample = only(LongBench(), Setting(chatty, None, data=folder))
    assert chatty.decode(sample.ids).startswith("[user]") is (name not in NO_CHAT)
    assert sample.stop_at_newline is (name == "samsum")
    assert set(NO_CHAT) == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def test_code_questions(tokenizer, folder, put):
    put("lcc", record(context="x = 1\n", input=""))
    put("repobench-p", record(context="x = 1\n", input="y = 2\n"))
    lcc, repobench = LongBench().samples(Setting(tokenizer, None, data=folder))
    assert tokenizer.decode(lcc.ids[lcc.context :]) == "Next:\n"
    assert tokenizer.decode(repobench.ids[repobench.context :]) == "y = 2\nNext:\n"


@pytest.mark.parametrize(
    ("name", "prompt", "question"),
    [
        (
            "qasper",  # another wording of the template
            "Read.\nAnswer from the art. \n\nAnswer from the article below.\nQuestion: Why?\nAnswer:\n",
            "Answer from the article below.\nQuestion: Why?\nAnswer:\n",
        ),
        ("passage_count", "Count.\nText.\n\nThe count is: ", "\n\nThe count is: "),
        ("lcc", "Complete.\nx\nNext:\n", "Next:\n"),
        ("trec", "Name.\nQuestion: A?\nType: x\nQuestion: B?\nType:", "\nQuestion: B?\nType:"),
        ("triviaqa", "Passage: x\n\nPassage:\nlong Passage: y\n\nAnswer:", "\n\nPassage:\nlong Passage: y\n\nAnswer:"),
        ("samsum", "Dialogue: x\nSummary: y\nDialogue: z\nSummary:", "Dialogue: z\nSummary:"),
        ("trec", "x" * 100, "x" * 64),  # nothing to go by
        ("qasper", "y" * 100, "y" * 64),
    ],
)
def test_question_of_a_ready_prompt(tokenizer, folder, put, name, prompt, question):
    assert ready_question(tokenizer, name, prompt, TEMPLATES[name]) == question
    put(
        name,
        {"prompt": prompt, "answers": ["7"], "all_classes": ["7", "8"], "idx": 0, "example_pred": ""},
        under="longbench/mini",
    )
    sample = only(LongBench(source="mini"), Setting(tokenizer, None, data=folder))
    assert tokenizer.decode(sample.ids) == prompt
    assert tokenizer.decode(sample.ids[sample.context :]) == question
    assert "length" not in sample.meta


@needs_data
def test_every_mini_prompt_ends_with_its_question(real):
    setting = Setting(real, 8192, data=DATA, limit=2, max_tokens=1500, chat=False)
    samples = LongBench(source="mini").samples(setting)
    assert len(samples) == 28
    for sample in samples:
        name, number = sample.id.split("/")
        lines = (MINI / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        prompt = json.loads(lines[int(number)])["prompt"]
        question = real.decode(sample.ids[sample.context :])
        assert prompt.endswith(question)
        assert 4 <= len(sample.ids) - sample.context <= 751
        json.dumps(sample.meta)


@needs_data
def test_full_records_fill_the_official_templates(real):
    prompts = json.loads((DATA / "longbench/config/dataset2prompt.json").read_text(encoding="utf-8"))
    setting = Setting(real, 8192, data=DATA, limit=2, max_tokens=1500, chat=False)
    samples = LongBench().samples(setting)
    assert [s.id for s in samples[::2]] == ["multifieldqa_zh/0", "multi_news/0", "passage_retrieval_zh/0"]
    for sample in samples:
        name, number = sample.id.split("/")
        with gzip.open(DATA / f"longbench/full/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            raw = [json.loads(next(file)) for _ in range(2)][int(number)]
        whole = prompts[name].format(**raw)
        assert sample.cut_from == setting.count(whole)
        assert real.decode(sample.ids).startswith(whole[:200])
        asked = real.decode(sample.ids[sample.context :])  # its first token may begin in the context's last newline
        assert asked.lstrip() == whole[whole.index(raw["context"]) + len(raw["context"]) :].lstrip()
        assert sample.answers == tuple(raw["answers"])


@needs_data
def test_questions_of_mini_prompts_are_the_templates_ends(real):
    prompts = json.loads((DATA / "longbench/config/dataset2prompt.json").read_text())
    shares = {"musique": 7, "dureader": 6, "gov_report": 12, "vcsum": 6, "passage_retrieval_zh": 15}
    for name, count in shares.items():
        records = [json.loads(line) for line in (MINI / f"{name}.jsonl").read_text().splitlines() if line]
        start = prompts[name].split("{context}")[1].split("{input}")[0]
        found = [ready_question(real, name, r["prompt"], prompts[name]) for r in records]
        assert [question.startswith(start) for question in found] == [True] * count


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz"])
def test_every_format_gives_the_same_samples(tokenizer, folder, put, ending):
    records = [record(), record(input="How?", answers=["so", "thus"], length=50)]
    put("qasper", *records, under="plain")
    put("qasper", *records, ending=ending, under="other")
    setting = Setting(tokenizer, None, data=folder)
    plain, other = (LongBench(source=str(folder / name)).samples(setting) for name in ("plain", "other"))
    assert len(plain) == 2
    assert plain == other


def test_sets_lie_in_full_or_beside_it(tokenizer, folder, put):
    put("qasper")
    put("lcc", under="longbench")
    assert [s.id for s in LongBench().samples(Setting(tokenizer, None, data=folder))] == ["qasper/0", "lcc/0"]


def test_a_limit_gives_a_prefix_and_a_set_does_not_depend_on_others(tokenizer, folder, put):
    for name in ("qasper", "lcc"):
        put(name, *(record(input=f"Question {i}?") for i in range(5)))
    every = LongBench().samples(Setting(tokenizer, None, data=folder))
    some = LongBench().samples(Setting(tokenizer, None, data=folder, limit=2))
    alone = LongBench(sets="lcc").samples(Setting(tokenizer, None, data=folder))
    assert some == every[:2] + every[5:7]
    assert alone == every[5:]
    assert len({s.id for s in every}) == 10


def test_names_of_sets():
    assert len(SETS) == 21
    assert len(ENGLISH) == 16
    assert len(E_SETS) == 13
    assert not set(ENGLISH) & {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
    scored = [*TEXT_SCORES, *CLASSES, *NUMBERS, *CODE]
    assert sorted(scored) == sorted(SETS)
    assert parse_task("longbench:sets=lcc,repobench-p").sets == ("lcc", "repobench-p")
    assert parse_task("longbench:sets=2wikimqa,source=mini").options() == {
        "sets": ["2wikimqa"],
        "source": "mini",
        "e": False,
    }


def test_english_leaves_chinese_sets_out(tokenizer, folder, put):
    put("qasper")
    put("lsht", record(all_classes=["because"]))
    setting = Setting(tokenizer, None, data=folder)
    assert [s.id for s in LongBench(sets="en").samples(setting)] == ["qasper/0"]
    assert [s.id for s in LongBench().samples(setting)] == ["qasper/0", "lsht/0"]


def test_buckets_of_longbench_e(tokenizer, folder, put):
    put("qasper_e", *(record(length=length) for length in (3999, 4000, 7999, 8000)))
    put("qasper")
    task = LongBench(e=True)
    samples = task.samples(Setting(tokenizer, None, data=folder))
    assert [s.meta["bucket"] for s in samples] == ["0-4k", "4-8k", "4-8k", "8k+"]
    assert samples[0].meta == {"set": "qasper", "length": 3999, "bucket": "0-4k"}
    assert samples[0].id == "qasper_e/0"
    assert task.heat == ("set", "bucket")
    assert LongBench().heat is None
    with pytest.raises(ValueError, match="no 'musique' among the sets of LongBench-E"):
        LongBench(sets="musique", e=True)


def test_errors_in_options(tokenizer, folder):
    with pytest.raises(ValueError, match="no 'qaspar' among the sets of LongBench; did you mean 'qasper'"):
        LongBench(sets="qaspar")
    with pytest.raises(ValueError, match="e is True or False, got 1"):
        LongBench(e=1)
    with pytest.raises(ValueError, match=r"source is .* got 3"):
        LongBench(source=3)
    with pytest.raises(ValueError, match="there is no folder 'nowhere'"):
        LongBench(source="nowhere").samples(Setting(tokenizer, None, data=folder))
    with pytest.raises(ValueError, match="needs a data folder"):
        LongBench().samples(Setting(tokenizer))


def test_missing_sets(tokenizer, folder, put):
    setting = Setting(tokenizer, None, data=folder)
    with pytest.raises(ValueError, match=r"no set of LongBench is in this source: looked for .*\.jsonl.* in "):
        LongBench().samples(setting)
    put("qasper")
    with pytest.raises(
        ValueError, match=r"no set 'lcc' in this source: looked for lcc\.jsonl, lcc\.json, lcc\.parquet"
    ):
        LongBench(sets=["qasper", "lcc"]).samples(setting)
    (folder / "longbench/full/lcc.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"lcc\.jsonl has no records"):
        LongBench(sets="lcc").samples(setting)


def test_malformed_lines_name_file_and_line(tokenizer, folder, put):
    put("qasper")
    path = folder / "longbench/full/qasper.jsonl"
    path.write_text(path.read_text() + "\n{broken\n")
    with pytest.raises(ValueError, match=r"qasper\.jsonl:3 is not JSON"):
        LongBench().samples(Setting(tokenizer, None, data=folder))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qasper", {"context": None}, "context None, which is not a text"),
        ("qasper", {"answers": "because"}, "answers 'because', which is not a list"),
        ("qasper", {"answers": []}, r"answers \[\], which is not a list"),
        ("trec", {}, "all_classes None, which is not a list"),
        ("passage_count", {"answers": ["7", "many"]}, r"answers \['7', 'many'\], of which one has no number"),
    ],
)
def test_bad_fields(tokenizer, folder, put, name, changes, message):
    put(name, record(answers=["7"]), record(**changes))
    if name == "trec":
        put(name, record(all_classes=["x"]), record())
    with pytest.raises(ValueError, match=rf"{name}\.jsonl, record 2, has {message}"):
        LongBench().samples(Setting(tokenizer, None, data=folder))


@pytest.mark.parametrize("name", ["input", "context", "answers"])
def test_missing_fields(tokenizer, folder, put, name):
    bad = record()
    del bad[name]
    put("qasper", bad)
    with pytest.raises(ValueError, match=rf"qasper\.jsonl, record 1, has no field '{name}'"):
        LongBench().samples(Setting(tokenizer, None, data=folder))


def test_missing_length_matters_in_buckets_only(tokenizer, folder, put):
    bad = record()
    del bad["length"]
    put("qasper", bad)
    put("qasper_e", bad)
    assert only(LongBench(), Setting(tokenizer, None, data=folder)).meta == {"set": "qasper"}
    with pytest.raises(ValueError, match="has no field 'length'"):
        LongBench(e=True).samples(Setting(tokenizer, None, data=folder))


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_the_hub_is_read_from_its_archive(tokenizer, folder, put, monkeypatch):
    records = [record(), record(input="How?")]
    put("qasper", *records)
    lines = "".join(json.dumps(r) + "\n" for r in records)
    archive = zipped(folder / "data.zip", {"data/qasper.jsonl": lines, "data/qasper_e.jsonl": "", "data/lcc.txt": ""})
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(archive))
    setting = Setting(tokenizer, None, data=folder)
    assert LongBench(source="hub").samples(setting) == LongBench().samples(setting)
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]
    assert LongBench(source=str(archive)).samples(setting) == LongBench().samples(setting)
    with pytest.raises(ValueError, match=r"no set 'lcc' in this source: looked for lcc\.jsonl in .*data\.zip"):
        LongBench(sets="lcc", source="hub").samples(setting)


def test_broken_archives(tokenizer, folder):
    setting = Setting(tokenizer, None, data=folder)
    bad = zipped(folder / "data.zip", {"data/qasper.jsonl": "{}\n{broken"})
    with pytest.raises(ValueError, match=r"data\.zip/data/qasper\.jsonl:2 is not JSON"):
        LongBench(source=str(bad)).samples(setting)
    zipped(bad, {"data/qasper.jsonl": b"\xff"})
    with pytest.raises(ValueError, match=r"qasper\.jsonl is not UTF-8"):
        LongBench(source=str(bad)).samples(setting)
    bad.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"cannot read .*data\.zip"):
        LongBench(source=str(bad)).samples(setting)


def test_no_network_is_one_sentence(tokenizer, folder, monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find it on disk\nand much more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError, match=r"cannot download data\.zip of THUDM/LongBench .*on disk.* source=FOLDER"
    ) as caught:
        LongBench(source="hub").samples(Setting(tokenizer, None, data=folder))
    assert "\n" not in str(caught.value)


def judge(name, output, *answers, classes=()):
    meta = {"set": name, "classes": list(classes)} if classes else {"set": name}
    return LongBench().judge(Sample("x", None, 1, 8, answers, meta), output)


KINDS = ["a", "ab", "abc", "xy", "x"]
BY_HAND = [  # the sets of which the data folder has no samples, and what is special
    ("multifieldqa_en", "the cat sat", ["cat sat down", "dog"], 0.8),
    ("hotpotqa", "\nYes, a dog", ["yes", "dog"], 2 / 3),
    ("qmsum", "the cat sat", ["the cat ran"], 2 / 3),
    ("samsum", "\n\nthe cat sat\nthe cat ran", ["the cat ran"], 2 / 3),  # only the first line counts
    ("samsum", "\n", ["the cat ran"], 0),
    ("triviaqa", "dog\ncat", ["cat", "horse"], 0),
    ("triviaqa", "dog\ncat", ["cat", "dog"], 1),
    ("trec", "xy\nab", ["xy"], 1),  # "x" is a part of the right class
    ("trec", "xy ab", ["xy"], 1 / 3),  # a, ab, xy
    ("trec", "\nab", ["xy"], 0),
    ("trec", "", ["xy"], 0),
    ("trec", "abc", ["abc"], 1 / 2),  # ab is not looked at after a is dropped
    ("lsht", "\nxy\nab", ["xy"], 1),
    ("passage_count", "12 or 7, 7", ["7"], 2 / 3),
    ("passage_count", "none", ["7"], 0),
    ("passage_count", "77", ["7"], 0),
    ("passage_retrieval_en", "Paragraph 3, not Paragraph 13", ["Paragraph 3"], 1 / 2),
    ("passage_retrieval_en", "3", ["Paragraph 3"], 1),
    ("passage_retrieval_zh", "段落13 段落3", ["段落3"], 1 / 2),
    ("repobench-p", "\n# note\n`x`\n// y\nabcd\nabxx", ["abxx"], 0.5),
    ("repobench-p", "# only a note", ["abxx"], 0),
    ("repobench-p", "# only a note", [""], 1),
    ("lcc", "abcd", ["wxyz", "abcd"], 1),
]


@pytest.mark.parametrize(("name", "output", "answers", "score"), BY_HAND)
def test_scores_by_hand(name, output, answers, score):
    classes = KINDS if name in ("trec", "lsht") else ()
    assert judge(name, output, *answers, classes=classes).score == pytest.approx(score, abs=1e-7)


def test_what_was_read_out_of_an_output():
    assert judge("qmsum", "the cat", "cat").parsed is None
    assert judge("triviaqa", "\ndog\ncat", "cat").parsed == "dog"
    assert judge("trec", "xy\nab", "xy", classes=KINDS).parsed == ["xy", "x"]
    assert judge("passage_count", "12 or 7", "7").parsed == ["12", "7"]
    assert judge("lcc", "# x\ny", "y").parsed == "y"


def test_code_has_the_indel_ratio_beside_it():
    judged = judge("lcc", "xyz12345", "1a2b3c4d5xyz")
    assert judged.score == 0.3  # difflib takes the longest block, xyz: 2 x 3 of 20 characters
    assert judged.metrics == {"indel": 0.5}  # 12345 in order: 2 x 5 of 20
    assert judge("lcc", "private int x", "private int y").metrics == {"indel": 0.92}  # 2 x 12 of 26 characters
    assert judge("lcc", "", "y").metrics == {"indel": 0}


@needs_data
@pytest.mark.parametrize("name", SETS)
def test_recorded_predictions_have_their_known_scores(name):
    expected = json.loads((DATA / "longbench/mini_expected_scores.json").read_text())
    path = MINI / f"{name}.jsonl"
    if not path.exists():
        assert name in {case[0] for case in BY_HAND}
        return
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    rows = []
    for r in records:
        classes = r["all_classes"] if name in CLASSES else ()
        score = judge(name, r["example_pred"], *r["answers"], classes=classes).score
        rows.append({"score": score, "meta": {"set": name}})
    assert [row["score"] for row in rows] == pytest.approx(expected["per_sample"][name], abs=1e-6)
    assert LongBench().total(rows) == pytest.approx(expected["mean_percent"][name], abs=0.01)


def test_sets_weigh_the_same():
    rows = [
        {"score": score, "meta": {"set": name}} for name, score in [("lcc", 1), ("lcc", 1), ("lcc", 1), ("trec", 0)]
    ]
    assert LongBench().total(rows) == 50
    assert LongBench().total(rows[:3]) == 100


def test_it_is_in_the_registry():
    task = get_task("longbench", sets=["trec"])
    assert task == LongBench(sets="trec")
    assert type(task)(**task.options()) == task
