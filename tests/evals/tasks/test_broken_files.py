"""Configuration in the data folder that somebody edited: every task says in one line what is wrong with which file."""

import json
import shutil

import pytest

from longwave.evals.task import Setting
from longwave.evals.tasks import parse_task
from tests.conftest import DATA

pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")

FILES = (
    *("infinitebench/templates.json", "ruler/templates_and_tasks.json", "leval/system_prompts.json"),
    *("loogle/config/task2prompt.json", "loogle/config/task2maxlen.json", "needles/classic.json"),
    *("longbench/config/dataset2prompt.json", "longbench/config/dataset2maxlen.json"),
    *("needles/needlebench_prompts.json", "needles/needlebench_style.jsonl"),
)
MISSING = object()
TEMPLATES, RULER, NEEDLES = "infinitebench/templates.json", "ruler/templates_and_tasks.json", "needles/classic.json"
PASSKEY, CLASSIC = "passkey:lengths=600", "needle:kind=classic,lengths=600,depths=0.5"
INFINITE = "infinitebench:sets=math_find,size=900"
LOOGLE = "loogle:sets=shortdep_qa"
QASPER = "longbench:sets=qasper"


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / name, tmp_path / name)
    record = {"input": "What is it?", "context": "A text.", "answers": ["It."], "length": 3, "all_classes": None}
    (tmp_path / "longbench" / "qasper.jsonl").write_text(json.dumps(record) + "\n")
    record = {"input": "A text.", "qa_pairs": [{"Q": "What is it?", "A": "It."}]}
    (tmp_path / "loogle" / "shortdep_qa.jsonl").write_text(json.dumps(record) + "\n")
    record = {"input": "A text.", "instructions": ["What?"], "outputs": ["It."], "evaluation": "f1"}
    (tmp_path / "leval" / "multidoc_qa.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def samples(tokenizer, folder, spec):
    return parse_task(spec).samples(Setting(tokenizer, limit=1, data=folder))


@pytest.mark.parametrize("spec", [PASSKEY, CLASSIC, INFINITE, LOOGLE, QASPER, "leval:sets=multidoc_qa"])
def test_whole_files(tokenizer, folder, spec):
    assert len(samples(tokenizer, folder, spec)) == 1


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        (PASSKEY, TEMPLATES),
        (PASSKEY, RULER),
        (CLASSIC, NEEDLES),
        (INFINITE, TEMPLATES),
        (LOOGLE, "loogle/config/task2maxlen.json"),
        (QASPER, "longbench/config/dataset2prompt.json"),
        ("leval:sets=multidoc_qa", "leval/system_prompts.json"),
        ("needle:kind=needlebench", "needles/needlebench_prompts.json"),
        ("ruler:tasks=vt,haystack=pydoc", RULER),
    ],
)
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}"], ids=["half", "not UTF-8", "a list", "empty"])
def test_damaged_files(tokenizer, folder, spec, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as error:
        samples(tokenizer, folder, spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "file", "names", "value", "message"),
    [
        (PASSKEY, TEMPLATES, ["gpt4_templates"], "x", "gpt4_templates in .* has no field 'passkey': it is 'x'"),
        (PASSKEY, RULER, ["noise"], 5, "has noise 5, which is not a text"),
        (INFINITE, TEMPLATES, ["gpt4_templates", "math_find"], MISSING, "has no field 'math_find'"),
        (INFINITE, TEMPLATES, ["gpt4_templates", "math_find"], "{context} {nope}", "a place that nothing fills"),
        (INFINITE, TEMPLATES, ["gpt4_templates", "math_find"], "{input}", "has 0 places for {context}, not one"),
        (CLASSIC, NEEDLES, ["single", "keywords"], [], r"has keywords \[\], which is not a list of texts"),
        (CLASSIC, NEEDLES, ["single", "needle"], None, "has needle None, which is not a text"),
        (
            LOOGLE,
            "loogle/config/task2maxlen.json",
            ["shortdep_qa"],
            "many",
            "is a whole number, at least 1; got 'many'",
        ),
        (LOOGLE, "loogle/config/task2prompt.json", ["shortdep_qa"], "{input} {Q", "a place that nothing fills"),
        (QASPER, "longbench/config/dataset2maxlen.json", ["qasper"], 0, "is a whole number, at least 1; got 0"),
        (QASPER, "longbench/config/dataset2prompt.json", ["qasper"], "no place", "has 0 places for {context}"),
        ("leval:sets=multidoc_qa", "leval/system_prompts.json", ["else"], MISSING, "has no field 'else'"),
        ("ruler:tasks=vt", RULER, ["tasks", "vt", "num_hops"], "4", "has num_hops '4', which is not of type int"),
        ("ruler:tasks=vt", RULER, ["tasks", "vt", "task"], "tracking", "unknown kind 'tracking'; did you mean"),
        ("ruler:tasks=vt", RULER, ["templates", "variable_tracking", "template"], "{query}", "has 0 places for"),
    ],
)
def test_files_without_what_is_read(tokenizer, folder, spec, file, names, value, message):
    whole = json.loads((folder / file).read_text(encoding="utf-8"))
    inner = whole
    for name in names[:-1]:
        inner = inner[name]
    if value is MISSING:
        del inner[names[-1]]
    else:
        inner[names[-1]] = value
    (folder / file).write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        samples(tokenizer, folder, spec)
