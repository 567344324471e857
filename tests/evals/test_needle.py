import re

import pytest
from PIL import Image

import longwave
from longwave.evals import needle
from longwave.evals.needle import NEEDLE, QUESTION, Answer, build_prompts, grid, heat_map, judge, run
from tests.conftest import random_profile

HAY = "".join(f"Sentence {chr(65 + i % 26)} of the hay says little. Is it so? It is! " for i in range(40))
LENGTHS, DEPTHS = (200, 333), (0.0, 0.3, 0.5, 1.0)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return build_prompts(tokenizer, HAY, LENGTHS, DEPTHS, repeats=2, seed=7)


def test_every_combination_once(prompts):
    cells = [(prompt.length, prompt.depth, prompt.repeat) for prompt in prompts]
    assert sorted(cells) == sorted((n, d, r) for n in LENGTHS for d in DEPTHS for r in range(2))


def test_prompts_have_the_asked_length(prompts):
    assert all(len(prompt.ids) == prompt.length for prompt in prompts)


def test_prompts_have_the_asked_length_with_the_real_tokenizer(smollm2, real_text):
    _, tokenizer = smollm2
    for prompt in build_prompts(tokenizer, real_text[:60_000], [128, 1000, 2001], [0.1, 0.9]):
        assert len(prompt.ids) == prompt.length
        text = tokenizer.decode(prompt.ids)
        assert text.count(NEEDLE.format(key=prompt.key)) == 1
        assert text.endswith(QUESTION)
        before = text[: text.index(NEEDLE.format(key=prompt.key))].rstrip()
        assert not before or before[-1] in ".?!"


def test_needle_is_there_once(prompts, tokenizer):
    for prompt in prompts:
        text = tokenizer.decode(prompt.ids)
        assert re.fullmatch("[1-9][0-9]{4}", prompt.key)
        assert text.count(NEEDLE.format(key=prompt.key)) == 1
        assert text.count(prompt.key) == NEEDLE.count("{key}")


def test_question_ends_the_prompt(prompts, tokenizer):
    for prompt in prompts:
        assert tokenizer.decode(prompt.ids[-prompt.question :]) == QUESTION


def test_needle_follows_a_sentence_near_its_depth(prompts, tokenizer):
    longest = max(len(part) for part in re.split(r"[.?!]", HAY)) + 1
    for prompt in prompts:
        before = tokenizer.decode(prompt.ids).index(NEEDLE.format(key=prompt.key))
        room = prompt.length - prompt.question - len(NEEDLE.format(key=prompt.key))
        wanted = int(room * prompt.depth)
        assert wanted - longest <= before <= wanted
        if 0 < before < room:
            assert tokenizer.decode(prompt.ids[:before])[-1] in ".?!"


def test_rest_is_one_stretch_of_the_haystack(prompts, tokenizer):
    for prompt in prompts:
        text = tokenizer.decode(prompt.ids[: -prompt.question])
        assert text.replace(NEEDLE.format(key=prompt.key), "") in HAY


def test_depths_share_text_and_key_but_repeats_do_not(prompts):
    keys = {(prompt.length, prompt.repeat): set() for prompt in prompts}
    for prompt in prompts:
        keys[prompt.length, prompt.repeat].add(prompt.key)
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(*keys.values())) == 4


def test_seed_decides_everything(prompts, tokenizer):
    assert build_prompts(tokenizer, HAY, LENGTHS, DEPTHS, repeats=2, seed=7) == prompts
    other = build_prompts(tokenizer, HAY, LENGTHS, DEPTHS, repeats=2, seed=8)
    assert all(a.key != b.key for a, b in zip(other, prompts, strict=True))


def test_a_cell_does_not_depend_on_the_others(prompts, tokenizer):
    (alone,) = build_prompts(tokenizer, HAY, [333], [0.5], seed=7)
    assert alone in prompts


@pytest.mark.parametrize("start", ["<s>", None])
def test_first_token_that_the_tokenizer_wants(tokenizer, start):
    if start is not None:
        from tokenizers.processors import TemplateProcessing

        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.add_special_tokens([start])
        number = backend.token_to_id(start)
        backend.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, number)])
        tokenizer = type(tokenizer)(tokenizer_object=backend, bos_token=start, pad_token="<pad>")
    for prompt in build_prompts(tokenizer, HAY, [200], [0.0, 0.5]):
        assert len(prompt.ids) == 200
        assert prompt.ids.count(tokenizer.bos_token_id) == (start is not None)
        assert start is None or prompt.ids[0] == tokenizer.bos_token_id


def test_too_short_a_length(tokenizer):
    with pytest.raises(ValueError, match="length of 130 tokens leaves no room"):
        build_prompts(tokenizer, HAY, [200, 130], [0.5])


def test_too_short_a_haystack(tokenizer):
    with pytest.raises(ValueError, match=r"haystack has 60 tokens, too few for a length of 200"):
        build_prompts(tokenizer, HAY[:60], [200], [0.5])


@pytest.mark.parametrize("depth", [-0.1, 1.1, 50])
def test_depth_outside_the_text(tokenizer, depth):
    with pytest.raises(ValueError, match=f"shares from 0 to 1, got {depth}"):
        build_prompts(tokenizer, HAY, [200], [depth])


@pytest.mark.parametrize(
    ("output", "score"),
    [
        *((" 12345.", 1), ("12345", 1), ("is 12345, not 54321", 1), ("It is:\n12345", 1)),
        *(("", 0), ("unknown", 0), ("54321 or 12345", 0), ("123456", 0), ("1234", 0), ("12 345", 0), ("012345", 0)),
    ],
)
def test_first_number_counts(output, score):
    assert judge(output, "12345") == score


def answer(method="dense", length=100, depth=0.5, score=1.0, repeat=0):
    return Answer(method, length, depth, repeat, "12345", "", score, 1.0)


def test_grid_is_the_mean_of_each_cell():
    answers = [
        answer(length=200, depth=0.9, score=1.0),
        answer(length=200, depth=0.9, score=0.0, repeat=1),
        answer(length=100, depth=0.1, score=1.0),
        answer(length=200, depth=0.1, score=0.0),
        answer(length=100, depth=0.9, score=0.0),
        answer("other", length=300, depth=0.7),
    ]
    assert grid(answers, "dense") == ([100, 200], [0.1, 0.9], [[1.0, 0.0], [0.0, 0.5]])
    assert grid(answers, "other") == ([300], [0.7], [[1.0]])


def test_cell_without_answers_is_nan():
    _, _, cells = grid([answer(length=100, depth=0.1), answer(length=200, depth=0.9)], "dense")
    assert str(cells) == "[[1.0, nan], [nan, 1.0]]"


@pytest.mark.parametrize("methods", [1, 3])
def test_heat_map_is_a_picture_with_a_panel_a_method(tmp_path, methods):
    answers = [
        answer(f"method {i}", length, depth, float(depth < 0.5))
        for i in range(methods)
        for length in (500, 1024, 777)
        for depth in (0.1, 0.9)
    ]
    heat_map(answers, tmp_path / "map.png", "title")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 400 * methods
        assert len(picture.convert("RGB").getcolors(2**24)) > 10


@pytest.fixture
def makers(llama):
    method = longwave.Fourier(keep=0.25, segment=16, states=2, sinks=2, window=16)
    return {
        "dense": lambda: longwave.cache(llama, "dense"),
        "fourier": lambda: longwave.cache(llama, method, profile=random_profile(llama)),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_run_asks_every_method_for_every_needle(llama, tokenizer, makers, batch):
    prompts = build_prompts(tokenizer, HAY, [180, 200], [0.1, 0.9], repeats=2)
    seen = []
    answers = list(run(llama, tokenizer, prompts, makers, batch, lambda *counts: seen.append(counts)))
    asked = sorted((a.method, a.length, a.depth, a.repeat, a.key) for a in answers)
    assert asked == sorted((m, p.length, p.depth, p.repeat, p.key) for m in makers for p in prompts)
    assert seen[0] == (0, 8)
    assert seen[-1] == (8, 8)
    for given in answers:
        assert given.score == judge(given.output, given.key)
        assert given.bytes_ratio < 0.75 if given.method == "fourier" else given.bytes_ratio >= 1


def test_answers_are_plain_generation(llama, models, tokenizer, makers):
    import torch

    prompts = build_prompts(tokenizer, HAY, [200], [0.3])
    (given,) = run(llama, tokenizer, prompts, {"dense": makers["dense"]})
    ids = torch.tensor([prompts[0].ids])
    out = models["llama"][1].generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=needle.ANSWER_TOKENS, do_sample=False
    )
    assert given.output == tokenizer.decode(out[0, 200:], skip_special_tokens=True)


def test_the_question_is_read_after_compression(llama, tokenizer, makers):
    """None of the answer may come from the exact pass, the question's first token included."""
    seen = []

    def watched():
        memory = makers["fourier"]()
        layer = memory.layers[0]
        attend = layer.attend

        def watch(q, *args, **options):
            seen.append((q.shape[2], layer.store is not None))
            return attend(q, *args, **options)

        layer.attend = watch
        return memory

    (prompt,) = build_prompts(tokenizer, HAY, [200], [0.3])
    list(run(llama, tokenizer, [prompt], {"fourier": watched}))
    assert seen[0] == (prompt.question, True)


def test_haystack_of_help_topics():
    text = needle.pydoc_haystack()
    assert len(text) > 400_000
    assert text == needle.pydoc_haystack()
