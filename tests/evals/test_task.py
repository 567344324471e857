"""Rendering and splitting prompts, whatever the chat template does."""

import copy

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizer

from longwave.evals.documents import ask
from longwave.evals.task import Setting

TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
TRIMS = TURNS.replace("m['content']", "m['content'] | trim")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
DATED = "{{ strftime_now('%H:%M:%S.%f') }}" + TURNS


@pytest.fixture
def chatty(tokenizer):
    def make(template):
        made = copy.copy(tokenizer)
        made.chat_template = template
        return Setting(made)

    return make


def test_question_starts_after_the_context(chatty):
    setting = chatty(TURNS)
    ids, context = setting.encode("A text. What?", " What?", prefix=" It is")
    assert setting.tokenizer.decode(ids) == "[user]A text. What?[assistant] It is"
    assert setting.tokenizer.decode(ids[:context]) == "[user]A text."


def test_without_a_question_the_last_token_is_left(chatty):
    ids, context = chatty(TURNS).encode("A text.", "", chat=False)
    assert context == len(ids) - 1


@pytest.mark.parametrize("template", [TURNS, TRIMS], ids=["as it is", "trims"])
def test_questions_that_start_with_newlines(chatty, template):
    setting = chatty(template)
    (prompt,) = ask(setting, "", "A document.", ["\n\nWhat is it?\n"], 5, "test", "start")
    assert setting.tokenizer.decode(prompt.ids[: prompt.context]).endswith("A document.")
    ids, context = setting.encode("\n\nOnly a question?", "\n\nOnly a question?")
    assert setting.tokenizer.decode(ids[:context]).strip() == "[user]"


def test_a_template_without_system_role_gets_it_in_the_users_turn(chatty):
    assert chatty(NO_SYSTEM).render("Ask.", system="Be brief.") == "[user]Be brief.\n\nAsk.[assistant]"
    assert chatty(TURNS).render("Ask.", system="Be brief.") == "[system]Be brief.[user]Ask.[assistant]"


def test_prompts_do_not_change_with_the_clock(chatty):
    assert chatty(DATED).render("Ask.") == "01 Jan 2025[user]Ask.[assistant]"


def test_a_template_that_fails_says_what_to_do(chatty):
    with pytest.raises(ValueError, match=r"chat template fails .*use --no-chat"):
        chatty("{% if messages %}").render("Ask.")


class Python(PreTrainedTokenizer):
    """The same ids as another tokenizer of single characters, and no offsets."""

    def __init__(self, vocabulary, **options):
        self.vocabulary, self.names = vocabulary, {i: name for name, i in vocabulary.items()}
        super().__init__(**options)

    vocab_size = property(lambda self: len(self.vocabulary))

    def get_vocab(self):
        return dict(self.vocabulary)

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.vocabulary.get(token)

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.fixture
def both(tokenizer):
    """Settings of two tokenizers that split alike, one of which knows where its tokens lie."""
    python = Python(tokenizer.get_vocab(), pad_token="<pad>")
    assert not python.is_fast
    return Setting(tokenizer, window=90), Setting(python, window=90)


@pytest.mark.parametrize(("prompt", "question"), [("A text. What?", " What?"), ("Only?", "Only?"), ("A text.", "")])
def test_a_tokenizer_without_offsets_finds_the_question(both, prompt, question):
    fast, slow = (setting.encode(prompt, question, prefix=" It") for setting in both)
    assert fast == slow


@pytest.mark.parametrize("keep", ["start", "ends"])
def test_a_tokenizer_without_offsets_cuts_documents_alike(both, keep):
    document = "".join(f"Line {number} of many. " for number in range(20))
    fast, slow = (ask(s, "Read: ", document, [" What?", " And who?"], 5, "test", keep) for s in both)
    assert fast == slow
    assert all(prompt.cut_from for prompt in fast)


def test_a_question_is_never_in_the_context_where_tokens_are_bytes():
    setting = Setting(ByT5Tokenizer())
    ids, context = setting.encode("Ein Stück: é", "é")
    assert setting.tokenizer.decode(ids[:context]) == "Ein Stück: "
    assert list(setting.spans("aé b")) == [(0, 1), (1, 1), (1, 2), (2, 3), (3, 4)]
