"""The pair at a size that learns nothing: all parts run, are written down and drawn; what a step is of is exact."""

import json

import numpy as np
import pytest
import torch

from benchmarks import diffusion_pair, plot_diffusion_pair
from longwave.models import load_tokenizer, locate
from tests.conftest import DATA

pytestmark = pytest.mark.skipif(not (DATA / "books").exists(), reason=f"no books at {DATA}")
SIZE = diffusion_pair.TINY


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    return load_tokenizer(locate("smollm2-q4"))


@pytest.fixture(scope="module")
def texts(smollm2_tokenizer):
    return diffusion_pair.Texts(smollm2_tokenizer, SIZE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a whole run: models, rows."""
    folder = tmp_path_factory.mktemp("pair")
    diffusion_pair.main(
        ["--tiny", "--train", "1", "--save", str(folder / "models"), "--out", str(folder / "rows.jsonl")]
    )
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_part_is_written_down(run):
    rows = rows_of(run / "rows.jsonl")
    about = rows[0]
    assert about["part"] == "about"
    assert about["training"]["steps"] > about["training"]["alone_steps"] > 0
    assert about["parameters"]["diffusion"] == about["parameters"]["autoregressive"]
    assert rows[-1]["part"] == "done"
    for kind in diffusion_pair.KINDS:
        mine = [row for row in rows if row.get("model") == kind]
        factors = {row["factor"] for row in mine if row["part"] == "reach"}
        assert len(factors) > 4
        for part, of_each in (("perplexity", len(SIZE.lengths)), ("needle", len(SIZE.lengths) * SIZE.depths)):
            assert sorted(row["factor"] for row in mine if row["part"] == part) == sorted(list(factors) * of_each)
    steps = [row["steps"] for row in rows if row["part"] == "steps"]
    assert sorted(set(steps)) == [1, diffusion_pair.WORDS]


def test_what_was_saved_is_judged_alike(run, tmp_path):
    again = tmp_path / "again.jsonl"
    diffusion_pair.main(
        ["--tiny", "--load", str(run / "models"), "--only", "perplexity", "--only", "needle", "--out", str(again)]
    )
    before = rows_of(run / "rows.jsonl")
    rows = rows_of(again)[1:-1]
    assert len(rows) == 2 * len(SIZE.lengths) * (1 + SIZE.depths)
    assert all(row in before for row in rows)


def test_a_picture_is_made(run, tmp_path):
    picture = tmp_path / "pair.png"
    diffusion_pair.main(["--plot", str(run / "rows.jsonl"), "--out", str(picture)])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    part = [row for row in rows_of(run / "rows.jsonl") if row["part"] in ("about", "steps")]
    plot_diffusion_pair.plot(part, picture)
    with pytest.raises(SystemExit, match="nothing was measured"):
        plot_diffusion_pair.plot(part[:1], picture)


def test_rows_are_of_the_seed_and_the_step(texts):
    ids, places = diffusion_pair.Steps(texts, 3, SIZE.context)[5]
    again, there = diffusion_pair.Steps(texts, 3, SIZE.context)[5]
    assert torch.equal(ids, again)
    assert all(torch.equal(places[kind], there[kind]) for kind in diffusion_pair.KINDS)
    assert not any(torch.equal(ids, steps[number][0]) for steps, number in others(texts, 3, 5))
    hidden, judged = (set(places[kind].tolist()) for kind in diffusion_pair.KINDS)
    first = {row * SIZE.context for row in range(SIZE.rows)}
    assert hidden < judged
    assert not judged & first


def others(texts, seed, step):
    return (diffusion_pair.Steps(texts, seed + 1, SIZE.context), step), (
        diffusion_pair.Steps(texts, seed, SIZE.context),
        step + 1,
    )


@pytest.mark.parametrize("tokens", [SIZE.short, SIZE.context])
def test_answers_are_what_counts(texts, smollm2_tokenizer, tokens):
    """Rows take turns; a fact stands whole in its row once, and once more with its answer counted."""
    asked = [number for number, kind in enumerate(diffusion_pair.ROWS) if kind == "asked"]
    for seed in range(20):
        ids, counts = texts.rows(np.random.default_rng(seed), tokens)
        assert ids.shape == counts.shape == (SIZE.rows * SIZE.context // tokens, tokens)
        assert counts[0].all()
        for row, count in zip(ids[asked], counts[asked], strict=True):
            said = smollm2_tokenizer.decode(row) + ".\n"
            answers = row[count].split(diffusion_pair.WORDS)
            assert count[-diffusion_pair.WORDS :].all()
            assert len({int(word) for answer in answers for word in answer}) == count.sum() > 0
            for answer in answers:
                assert said.count(f"{smollm2_tokenizer.decode(answer)}.\n") == 2


def test_words_of_a_repeated_fact_count_from_the_second_time_on(texts):
    """Behind one token stands always the same word."""
    number = diffusion_pair.ROWS.index("repeated")
    for step in range(20):
        ids, counts = texts.rows(np.random.default_rng(step), SIZE.context)
        for row, counted in ((ids[number].tolist(), counts[number].tolist()),):
            words = {token for token, count in zip(row, counted, strict=True) if count}
            behind = {}
            for at, (token, count) in enumerate(zip(row, counted, strict=True)):
                assert count == (token in words and token in row[:at])
                if token in words:
                    assert behind.setdefault(token, row[at - 1]) == row[at - 1]
            assert words


def test_a_needle_is_as_deep_as_said(texts):
    for depth in (0, 0.5, 1):
        prompt, value, distance = texts.needle(np.random.default_rng(1), 100, depth)
        assert len(prompt) + len(value) == 100
        end, name = len(prompt) - distance, prompt[-1]
        (told,) = texts.told([[name, *value]])
        assert prompt[end - len(told) : end] == told.tolist()
        assert prompt[-len(texts.question(0)) :] == texts.question(name)
    assert distance == len(texts.question(0))


def test_masks_are_of_what_counts():
    counts = torch.zeros(8, 20, dtype=torch.bool)
    counts[:4, 5:15] = counts[4:, 12:14] = True
    numbers = torch.zeros(8, 20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        hidden = diffusion_pair.masks(counts, generator)
        assert not (hidden & ~counts).any()
        assert hidden.any(-1).all()
        numbers += hidden
    assert (numbers[:4, 5:15] / 400 - 0.55).abs().max() < 0.1  # k of 1 to 10
    assert (numbers[4:, 12:14] / 400 - 0.75).abs().max() < 0.1


def test_losses_are_those_that_are_judged(texts, smollm2_tokenizer):
    """Of the last tokens of a row: the causal one's is the same number, diffusion's is the bound's expectation."""
    ids = texts.windows(SIZE.context, 2)
    last = torch.tensor([SIZE.context - 1, 2 * SIZE.context - 1])
    for kind in diffusion_pair.KINDS:
        torch.manual_seed(0)
        model = diffusion_pair.untrained(kind, smollm2_tokenizer, SIZE).eval()
        with torch.no_grad():
            mine = diffusion_pair.step_loss(kind, model, ids, last)
            judged = diffusion_pair.text_loss(kind, model, ids, 1)
        torch.testing.assert_close(mine.double(), judged, rtol=1e-5, atol=0)


def test_another_base_in_16_bits(smollm2_tokenizer):
    """Weights are the same, and the rotary frequencies those of the base, not rounded."""
    plain = diffusion_pair.weights_in(diffusion_pair.untrained("diffusion", smollm2_tokenizer, SIZE), torch.bfloat16)
    turned = diffusion_pair.with_base(plain, 4)
    assert plain.config.rope_parameters["rope_theta"] == diffusion_pair.BASE
    assert not turned.config.is_causal
    assert all(torch.equal(x, turned.state_dict()[name]) for name, x in plain.state_dict().items())
    pairs = SIZE.channels // 2
    wanted = (4 * diffusion_pair.BASE) ** (-torch.arange(pairs) / pairs)
    torch.testing.assert_close(turned.model.rotary_emb.inv_freq, wanted)


def test_where_retrieval_ends():
    assert diffusion_pair.reached({512: 0.9, 1024: 0.5, 1536: 0.4, 2048: 0.8}) == 1024
    assert diffusion_pair.reached({512: 0.9, 1024: 0.9}) == 1024
    assert diffusion_pair.reached({512: 0.05, 1024: 0.9}) is None
