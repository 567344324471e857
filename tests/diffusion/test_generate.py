import copy

import pytest
import torch
from transformers import StoppingCriteriaList, TextStreamer

import longwave
from longwave.diffusion import Dream, LLaDA, blocks, generate
from tests.conftest import into, left_padded, tokens
from tests.diffusion.conftest import END, MASK

PROMPT = tokens(1, 20, seed=5)[:, :].clamp(max=94)


@torch.no_grad()
def llada_by_hand(model, prompt, new, length, steps, guidance=0.0):
    """LLaDA's greedy sampler, spelled out over whole texts."""
    text = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    count, size = new // length, prompt.shape[1]
    for block in range(count):
        end = size + (block + 1) * length
        each = steps // count
        for step in range(each):
            logits = model(text).logits
            if guidance:
                hidden = text.clone()
                hidden[:, :size] = MASK
                free = model(hidden).logits
                logits = free + (guidance + 1) * (logits - free)
            logits[..., MASK] = -torch.inf
            best = logits.argmax(-1)
            sure = torch.softmax(logits.double(), -1).gather(-1, best[..., None])[0, :, 0]
            sure[(text[0] != MASK) | (torch.arange(text.shape[1]) >= end)] = -torch.inf
            many = length // each + (step < length % each)
            for place in sure.topk(many).indices:
                text[0, place] = best[0, place]
    return text


@torch.no_grad()
def dream_by_hand(model, prompt, new, steps):
    """Dream's sampler with least entropy, greedy, spelled out."""
    text = torch.cat([prompt, torch.full((1, new), MASK)], 1)
    noise = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        logits = model(text).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        logits[..., MASK] = -torch.inf
        p = torch.softmax(logits.double(), -1)
        sure = (p * (p + 1e-10).log()).sum(-1)[0]
        masks = text[0] == MASK
        sure[~masks] = -torch.inf
        share = 1 if step == steps - 1 else 1 - noise[step + 1] / noise[step]
        for place in sure.topk(int(masks.sum() * share)).indices:
            text[0, place] = logits[0, place].argmax()
    return text


@pytest.mark.parametrize(("length", "steps"), [(24, 24), (8, 24), (8, 9), (12, 4), (6, 4)])
def test_llada_as_spelled_out(llada, length, steps):
    found = generate(llada, PROMPT, max_new_tokens=24, block_length=length, steps=steps)
    assert torch.equal(found, llada_by_hand(llada, PROMPT, 24, length, steps))


def test_guidance_as_spelled_out(llada):
    sampler = LLaDA(guidance=1.5)
    found = generate(llada, PROMPT, sampler=sampler, max_new_tokens=16, block_length=8, steps=8)
    assert torch.equal(found, llada_by_hand(llada, PROMPT, 16, 8, 8, guidance=1.5))
    assert not torch.equal(found, generate(llada, PROMPT, max_new_tokens=16, block_length=8, steps=8))


@pytest.mark.parametrize("steps", [1, 7, 16, 40])
def test_dream_as_spelled_out(dream, steps):
    assert torch.equal(generate(dream, PROMPT, max_new_tokens=16, steps=steps), dream_by_hand(dream, PROMPT, 16, steps))


SAMPLERS = [
    LLaDA(),
    LLaDA(temperature=0.7),
    LLaDA(remasking="random"),
    LLaDA(guidance=0.5, temperature=1),
    Dream(algorithm="origin", temperature=0.5),
    Dream(algorithm="maskgit_plus", temperature=1, top_p=0.9),
    Dream(algorithm="topk_margin", top_k=5),
    Dream(choice_temperature=0.5),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_rows_do_not_depend_on_each_other_or_on_padding(both, sampler):
    ids, mask = left_padded(3, 18, [0, 7, 17])
    ids = ids.clamp(max=94)
    how = dict(sampler=sampler, max_new_tokens=12, block_length=6, steps=8)
    found = generate(both, ids, mask, seed=11, **how)
    assert torch.equal(found[:, :18], ids)
    assert not bool((found[:, 18:] == MASK).any())
    for row, pad in enumerate((0, 7, 17)):
        alone = generate(both, ids[row : row + 1, pad:], seed=11 + row, **how)
        assert torch.equal(alone[0], found[row, pad:])


def test_seeds(llada):
    how = dict(sampler=LLaDA(temperature=1.0), max_new_tokens=8)
    one, two, other = (generate(llada, PROMPT, seed=seed, **how) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    torch.manual_seed(4)
    first, second = generate(llada, PROMPT, **how), generate(llada, PROMPT, **how)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(first, generate(llada, PROMPT, **how))


def test_passes_that_would_decide_nothing_are_left_out(both):
    found = list(blocks(both, PROMPT, max_new_tokens=8, block_length=4, steps=40))
    assert [len(found), *(block.passes <= 4 for block in found)] == [2, True, True]


def test_a_threshold_keeps_what_is_sure(llada):
    how = dict(max_new_tokens=16, block_length=8)
    none = list(blocks(llada, PROMPT, threshold=1e-9, **how))
    assert [block.passes for block in none] == [1, 1]
    one = list(blocks(llada, PROMPT, threshold=1.0, **how))
    assert [block.passes for block in one] == [8, 8]
    step_by_step = generate(llada, PROMPT, **how)
    assert torch.equal(torch.cat([block.tokens for block in one], 1), step_by_step[:, 20:])
    between = sum(block.passes for block in blocks(llada, PROMPT, threshold=0.3, **how))
    assert 2 < between < 16


def test_rows_under_a_threshold_do_not_depend_on_each_other(llada):
    ids = tokens(3, 12).clamp(max=94)
    found = generate(llada, ids, threshold=0.4, max_new_tokens=12, block_length=6)
    for row in range(3):
        assert torch.equal(
            found[row], generate(llada, ids[row : row + 1], threshold=0.4, max_new_tokens=12, block_length=6)[0]
        )


# ends


DRAWN = dict(sampler=LLaDA(temperature=1.0), seed=1, max_new_tokens=24, block_length=8)


@pytest.fixture
def ending(llada):
    """A prompt's answer without ends, and a token that stands in its second block first."""
    plain = generate(llada, PROMPT, **DRAWN)[0, 20:]
    where = next(i for i in range(8, 16) if int(plain[i]) not in plain[:i].tolist())
    return plain, where


def test_a_row_ends_at_its_first_stop(llada, ending):
    plain, where = ending
    how = dict(**DRAWN, stop_ids=[int(plain[where])])
    found = generate(llada, PROMPT, **how)
    assert torch.equal(found[0, 20:], plain[: where + 1])
    assert len(list(blocks(llada, PROMPT, **how))) == 2


def test_what_ends_is_padded_and_the_others_go_on(llada, ending):
    plain, where = ending
    ids = torch.cat([PROMPT, tokens(1, 20, seed=8).clamp(max=94)])
    found = generate(llada, ids, **DRAWN, stop_ids=[int(plain[where])], pad_token_id=0)
    alone = generate(llada, ids[1:], **{**DRAWN, "seed": 2}, stop_ids=[int(plain[where])])
    assert torch.equal(found[0, 20 : 21 + where], plain[: where + 1])
    assert not found[0, 21 + where :].any()
    assert torch.equal(found[1, : alone.shape[1]], alone[0])


def test_the_models_own_end_stops(llada, ending):
    plain, where = ending
    llada.config.eos_token_id = int(plain[where])
    assert generate(llada, PROMPT, **DRAWN).shape[1] == 21 + where
    assert generate(llada, PROMPT, **DRAWN, stop_ids=()).shape[1] == 44


def test_criteria_are_asked_token_by_token(llada, ending):
    plain, where = ending
    wanted = int(plain[where])
    criteria = StoppingCriteriaList([lambda ids, scores: ids[:, -1] == wanted])
    found = generate(llada, PROMPT, **DRAWN, stopping_criteria=criteria)
    assert torch.equal(found[0, 20:], plain[: where + 1])


def test_ends_that_never_come_and_that_come_last(llada):
    how = dict(max_new_tokens=12, block_length=12)
    plain = generate(llada, PROMPT, **how)[0, 20:]
    ends = plain.unique()[:3].tolist()
    never = generate(llada, PROMPT, sampler=LLaDA(eos="never"), stop_ids=ends, **how)
    assert never.shape[1] == 32
    assert not set(never[0, 20:].tolist()) & set(ends)
    every = list(range(95))  # whatever is drawn, it ends the answer: all are least sure, and the order is by place
    last = generate(llada, PROMPT, sampler=LLaDA(eos="last"), stop_ids=every, **how)
    assert last.shape[1] >= 21


# streams


class Parts:
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, ids):
        self.parts.append(ids)

    def end(self):
        self.ended = True


def test_blocks_are_streamed(both):
    parts = Parts()
    found = generate(both, PROMPT, max_new_tokens=12, block_length=4, streamer=parts)
    assert [part.shape[1] for part in parts.parts] == [20, 4, 4, 4]
    assert torch.equal(torch.cat(parts.parts, 1), found)
    assert parts.ended


def test_a_stream_stops_where_the_text_does(llada, ending):
    plain, where = ending
    parts = Parts()
    found = generate(llada, PROMPT, **DRAWN, stop_ids=[int(plain[where])], streamer=parts)
    assert torch.equal(torch.cat(parts.parts, 1), found)


def test_transformers_streamer(llada, tokenizer, capsys):
    found = generate(llada, PROMPT, max_new_tokens=8, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(found[0, 20:]).strip()


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number of tokens, at least 1; got 0"),
        ({"block_length": 2.0}, "block_length is a whole number of tokens, at least 1; got 2.0"),
        ({"block_length": 7}, "16 new tokens are no whole number of blocks of 7"),
        ({"block_length": 4, "steps": 6}, "6 steps cannot be shared evenly by 4 blocks"),
        ({"steps": 0}, "steps is a whole number"),
        ({"steps": 4, "threshold": 0.9}, "give one of them"),
        ({"threshold": 0}, "threshold is a confidence above 0 and at most 1"),
        ({"threshold": True}, "threshold is a confidence"),
        ({"threshold": 0.9, "sampler": LLaDA(remasking="random")}, "takes no threshold"),
        ({"threshold": 0.9, "sampler": Dream()}, "takes no threshold"),
        ({"threshold": 0.9, "sampler": Dream(algorithm="maskgit_plus", choice_temperature=1)}, "takes no threshold"),
        ({"keep": "dual"}, "keep='dual' decides nothing without a cache"),
        ({"refresh": 2}, "refresh=2 decides nothing without a cache"),
        ({"delay": 1}, "delay=1 decides nothing without a cache"),
        ({"delay": -1}, "delay is a whole number of passes, at least 0; got -1"),
        ({"seed": 0.5}, "seed is a whole number"),
        ({"stop_ids": ["</s>"]}, "a stop id is a whole number"),
        ({"sampler": LLaDA(eos="last")}, "none is known: give stop_ids"),
        ({"attention_mask": torch.ones(1, 3)}, r"the attention mask is \[1, 3\] and ids are \[1, 20\]"),
        ({"attention_mask": torch.arange(20, 0, -1)[None] > 4}, "padding comes before a prompt"),
        ({"attention_mask": torch.zeros(1, 20)}, "every row has a token"),
    ],
    ids=str,
)
def test_wrong_options(llada, options, message):
    with pytest.raises(ValueError, match=message):
        generate(llada, PROMPT, **{"max_new_tokens": 16, **options})


@pytest.mark.parametrize("ids", [[1, 2], torch.ones(3), torch.ones(1, 3), torch.ones(1, 0, dtype=torch.long)], ids=str)
def test_wrong_ids(llada, ids):
    with pytest.raises(ValueError, match="ids are whole numbers"):
        generate(llada, ids)


def test_wrong_models(models, llada):
    with pytest.raises(ValueError, match="attention is causal"):
        generate(copy.deepcopy(models["llama"][1]), PROMPT)
    llada.config.mask_token_id = None
    with pytest.raises(ValueError, match="names no mask_token_id"):
        generate(llada, PROMPT)


def test_a_prompt_with_masks(llada):
    with pytest.raises(ValueError, match="a prompt holds the mask token 96"):
        generate(llada, torch.cat([PROMPT, torch.tensor([[MASK, END]])], 1))


def test_a_sampler_of_another_kind(llada):
    with pytest.raises(TypeError, match="sampler is LLaDA"):
        generate(llada, PROMPT, sampler="entropy")


def test_wrong_caches(llada):
    memory = longwave.cache(llada, "dense")
    for options, message in (({"keep": "duel"}, "did you mean 'dual'"), ({"refresh": 0}, "refresh is a whole number")):
        with pytest.raises(ValueError, match=message):
            generate(llada, PROMPT, cache=memory, **options)
    with pytest.raises(TypeError, match="cache is a longwave"):
        generate(llada, PROMPT, cache="fourier")
    with pytest.raises(ValueError, match="built on another model"):
        generate(copy.deepcopy(llada), PROMPT, cache=memory)
    with torch.no_grad():
        llada(PROMPT, **into(memory))
    with pytest.raises(ValueError, match="the cache holds 20 tokens already"):
        generate(llada, PROMPT, cache=memory)
