import copy

import pytest
import transformers

import longwave.models
from longwave.evals.documents import ask, mean_over_sets, mean_score
from longwave.evals.task import Setting

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}[model]"
WORDS = " ".join(f"word{number}" for number in range(200))
QUESTIONS = [" Which is the longest of them?", " Why?", " And how many?"]


@pytest.fixture(scope="module")
def chatty(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHAT
    return made


def asked(
    tokenizer, keep="start", window=300, max_tokens=None, document=WORDS, chat=True, system=None, before="Read: "
):
    setting = Setting(tokenizer, window, max_tokens=max_tokens)
    return ask(setting, before, document, QUESTIONS, 20, "test", keep, system, chat)


@pytest.mark.parametrize("system", [None, "Be good."])
@pytest.mark.parametrize("keep", ["start", "ends"])
@pytest.mark.parametrize("chat", [True, False])
def test_contexts_agree_and_prompts_fill_the_window(chatty, keep, chat, system):
    prompts = asked(chatty, keep, chat=chat, system=system)
    assert len({prompt.ids[: prompt.context].tobytes() for prompt in prompts}) == 1
    longest = max(len(prompt.ids) for prompt in prompts)
    slack = 10 if keep == "start" else 0  # a whole word
    assert 280 - slack <= longest <= 280
    for prompt, question in zip(prompts, QUESTIONS, strict=True):
        rest = chatty.decode(prompt.ids[prompt.context :])
        assert rest == question + ("[/][model]" if chat else "")


def test_the_start_is_kept_in_whole_words(tokenizer):
    prompt = asked(tokenizer)[0]
    kept = tokenizer.decode(prompt.ids[: prompt.context]).removeprefix("Read: ")
    assert WORDS.startswith(kept + " ")
    assert prompt.cut_from == len("Read: " + WORDS + QUESTIONS[0])


def test_text_without_spaces_is_cut_all_the_same(tokenizer):
    prompt = asked(tokenizer, document="x" * 1000)[0]
    assert len(prompt.ids) == 280


def test_both_ends_are_halves_of_the_prompt(tokenizer):
    prompt = asked(tokenizer, "ends")[0]
    text = tokenizer.decode(prompt.ids)
    whole = "Read: " + WORDS + QUESTIONS[0]
    assert text == whole[:140] + whole[-140:]


def test_max_tokens_does_not_count_the_template(chatty):
    assert len(asked(chatty, "ends", max_tokens=100)[0].ids) == 100 + Setting(chatty).added(True)


@pytest.mark.parametrize("window", [None, 5000])
def test_nothing_is_cut_where_it_fits(tokenizer, window):
    for prompt, question in zip(asked(tokenizer, window=window), QUESTIONS, strict=True):
        assert tokenizer.decode(prompt.ids) == "Read: " + WORDS + question
        assert prompt.cut_from is None


def test_no_document(tokenizer):
    for prompt, question in zip(asked(tokenizer, document=""), QUESTIONS, strict=True):
        assert tokenizer.decode(prompt.ids[prompt.context :]) == question


def test_no_room(tokenizer):
    with pytest.raises(ValueError, match=r"test: .* no room for the document in 30 tokens"):
        asked(tokenizer, window=50)


def test_a_token_across_the_border_goes_to_the_question():
    tokenizer = transformers.AutoTokenizer.from_pretrained(longwave.models.smollm2())
    setting = Setting(tokenizer, chat=False)
    prompts = ask(setting, "", "A story about bird", ["s and trees. Who?", "cage? Yes.", " Why?"], 5, "test", "start")
    assert len({prompt.ids[: prompt.context].tobytes() for prompt in prompts}) == 1
    for prompt, end in zip(prompts, ["s and trees. Who?", "cage? Yes.", " Why?"], strict=True):
        assert tokenizer.decode(prompt.ids) == "A story about bird" + end


def test_sets_weigh_the_same():
    rows = [{"meta": {"set": name}, "score": score} for name, score in (("a", 1.0), ("b", 0.0), ("b", 0.0))]
    assert mean_over_sets(rows, mean_score) == 50
