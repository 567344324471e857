"""Rendering and splitting prompts, whatever the chat template does."""

import copy

import pytest

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
