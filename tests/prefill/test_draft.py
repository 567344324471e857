"""What a draft writes: transformers' own greedy answer, row by row."""

import pytest
import torch
from transformers import DynamicCache

from longwave.prefill.draft import checked_mask, write_on
from tests.conftest import VOCABULARY, build, left_padded, shallow, tokens


@pytest.fixture(scope="module")
def draft():
    return shallow(build("llama", torch.float64), 1)


def written(draft, ids, mask=None, count=6, known=VOCABULARY):
    mask = torch.ones_like(ids) if mask is None else mask
    return write_on(draft, DynamicCache(config=draft.config), ids, mask, count, known)


def test_it_is_the_greedy_answer(draft):
    ids, mask = left_padded(2, 40, [0, 13])
    want = draft.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 40:]
    assert torch.equal(written(draft, ids, mask), want)
    assert torch.equal(written(draft, ids[1:, 13:]), want[1:])


def test_it_does_not_end_and_writes_what_its_reader_knows(draft, monkeypatch):
    ids = tokens(2, 40)
    first = written(draft, ids)
    end = int(first[0, 2])
    monkeypatch.setattr(draft.generation_config, "eos_token_id", [end, 5000])
    again = written(draft, ids)
    assert torch.equal(again[0, :2], first[0, :2])
    assert end not in again[0]
    assert int(written(draft, ids, known=20).max()) < 20


def test_what_no_draft_can_go_on_from(draft):
    with pytest.raises(ValueError, match=f"the prompt has token 200 and the draft knows {VOCABULARY}"):
        written(draft, torch.tensor([[3, 200]]))
    ids = tokens(2, 5)
    with pytest.raises(ValueError, match=r"a prompt is token ids \[batch, tokens\], got \[5\] of torch.int64"):
        checked_mask(ids[0], None)
    with pytest.raises(ValueError, match=r"the attention mask is \[2, 9\] and the prompt \[2, 5\]"):
        checked_mask(ids, torch.ones(2, 9))
    mask = torch.ones_like(ids)
    mask[1, -1] = 0
    with pytest.raises(ValueError, match="some rows end in padding: pad on the left"):
        checked_mask(ids, mask)
