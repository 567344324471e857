import gzip
import json
import re

import pytest
import transformers

from longwave.evals.task import Sample, Setting
from longwave.evals.tasks.keyvalue import KeyValue, Lines
from longwave.models import smollm2
from tests.conftest import DATA

needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")


@pytest.fixture(scope="module")
def setting():
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    return lambda limit=3, window=None, folder=DATA: Setting(tokenizer, window, 42, limit, folder)


def halves(setting, sample):
    decode = setting().tokenizer.decode
    return decode(sample.ids[: sample.context]), decode(sample.ids[sample.context :])


@needs_data
def test_pairs_stand_where_asked(setting):
    samples = KeyValue(depths=(0.0, 0.5, 1)).samples(setting())
    assert [s.id for s in samples] == [f"{d}/{n}" for d in ("0", "0.5", "1") for n in (1, 2, 3)]
    for sample in samples:
        context, question = halves(setting, sample)
        pairs = json.loads(context[context.index("{") : context.rindex("}") + 1])
        key = re.match(r'Key: "([^"]+)"\nCorresponding value:', question)[1]
        assert len(pairs) == 75
        assert pairs[key] == sample.answers[0]
        assert list(pairs).index(key) == round(74 * sample.meta["depth"])


@needs_data
def test_moving_the_pair_changes_nothing_else(setting):
    texts = [halves(setting, s) for s in KeyValue(depths=(0.25, 0.75)).samples(setting(limit=1))]
    assert sorted(re.findall(r'"([^"]+)": "([^"]+)"', texts[0][0])) == sorted(
        re.findall(r'"([^"]+)": "([^"]+)"', texts[1][0])
    )
    assert texts[0][1] == texts[1][1]


@needs_data
def test_lines(setting):
    samples = Lines().samples(setting())
    assert [s.id for s in samples] == ["200/1", "200/2", "200/3"]
    for sample in samples:
        context, question = halves(setting, sample)
        name = re.match(r"Now the record is over\..* in line (.+?)\?", question)[1]
        held = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", context, re.MULTILINE)
        assert len(held) == 200
        assert (name, sample.answers[0]) in held


@needs_data
def test_errors(setting):
    with pytest.raises(ValueError, match="has no cases of 300 lines; it has 200, 600"):
        Lines(sizes=300).samples(setting())
    with pytest.raises(ValueError, match="kv \\(record 1\\) takes"):
        KeyValue().samples(setting(window=4096))
    with pytest.raises(ValueError, match="lines at 200 \\(record 1\\) takes"):
        Lines().samples(setting(window=4096))
    with pytest.raises(ValueError, match=r"shares from 0 to 1, got 1\.5"):
        KeyValue(depths=1.5)


@needs_data
def test_malformed_pairs(setting, tmp_path):
    for folder in ("infinitebench", "ruler", "longeval"):
        (tmp_path / folder).symlink_to(DATA / folder)
    file = tmp_path / "kv_retrieval/kv-retrieval-75_keys.first100.jsonl.gz"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(b'{"ordered_kv_records": [["a", "b"]], "key": "c", "value": "d"}\n'))
    with pytest.raises(ValueError, match=":1: the key c is there 0 times"):
        KeyValue().samples(setting(folder=tmp_path))
    file.write_bytes(gzip.compress(b'{"key": "c", "value": "d"}\n'))
    with pytest.raises(ValueError, match=":1 has no field 'ordered_kv_records'"):
        KeyValue().samples(setting(folder=tmp_path))


def test_judges():
    kv = Sample("x", [1, 2], 1, 100, ("ab-12",))
    assert [KeyValue().judge(kv, text).score for text in ("It is AB-12.", "ab-1", "")] == [1.0, 0.0, 0.0]
    line = Sample("x", [1, 2], 1, 100, ("2416",))
    outputs = {"line 3 holds <2416>": "2416", "2416, I think of line 7": "7", "<24160>": "24160", "none": None}
    judged = [Lines().judge(line, output) for output in outputs]
    assert [j.parsed for j in judged] == list(outputs.values())
    assert [j.score for j in judged] == [1.0, 0.0, 0.0, 0.0]
