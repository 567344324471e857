"""A talk, driven by what is typed: turns, files, orders, Ctrl-C."""

import re
import shutil
import signal

import pytest
import torch
from transformers import LlamaForCausalLM, TextStreamer
from typer.testing import CliRunner

from longwave.cli import app, prefix
from longwave.cli import talk as talks
from longwave.cli.orders import ORDERS
from longwave.saved import look
from tests.cli.calls import SEGMENTS, TEXT, refused

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NEW = 12
DENSE = ["--method", "dense"]
PROMPT = r"\[(nothing read|[\d,]+ tokens [^\]]*)\] > "


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """The small model, with a chat template. One id a character, so that texts are read alike in parts and whole."""
    path = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(folder, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def talk(place):
    """What a talk prints: (answers, prompt lines, stderr) for what is typed."""

    def run(*typed, more=(), end=True):
        given = ["chat", place, "--max-new-tokens", NEW, "--no-measure", *more]
        lines = "".join(f"{line}\n" for line in typed)
        result = CliRunner().invoke(app, [str(part) for part in given], input=lines)
        assert (result.exit_code == 0) == end, (result.stderr, result.exception)
        prompts = re.findall(PROMPT, result.stdout)
        answers = re.split(PROMPT, result.stdout)[2::2]
        return [answer.removesuffix("\n") for answer in answers], prompts, result.stderr

    return run


@pytest.fixture
def expected(place, tokenizer):
    """The answers of stock transformers that reads the whole talk anew for each."""
    model = LlamaForCausalLM.from_pretrained(place)

    def run(*questions, before=""):
        text, answers = before, []
        for question in questions:
            text += f"<user>{question}</><assistant>" if not (answers == [] and before) else f"{question}</><assistant>"
            ids = tokenizer(text, return_tensors="pt").input_ids
            out = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
            text += f"{answers[-1]}</>"
        return answers

    return run


def test_turns_are_those_of_the_template(talk, expected):
    """Every turn is read once, behind what was answered, and nothing differs from reading the whole talk anew."""
    questions = ["What is blue?", "And what is not?", "Why?"]
    answers, prompts, said = talk(*questions, "/quit")
    assert answers[:3] == expected(*questions)
    assert prompts[0] == "nothing read"
    held = [int(prompt.split()[0]) for prompt in prompts[1:]]
    first = len("<user>What is blue?</><assistant>") + NEW - 1  # the last new token is not read
    assert held[:2] == [first, first + len("</><user>And what is not?</><assistant>") + NEW]
    assert prompts[1].startswith(f"{first} tokens in ")
    assert "the talk is held by fourier(" in said
    assert "plan for 0.25" in said


def test_documents_come_first(talk, expected, tmp_path):
    files = []
    for name, text in (("a", TEXT[:90]), ("b", TEXT[90:150])):
        (tmp_path / name).write_text(text)
        files += ["--file", tmp_path / name]
    answers, prompts, _ = talk("Is it?", "Sure?", more=files)
    before = f"<user>{TEXT[:90]}\n\n{TEXT[90:150]}"
    assert answers[:2] == expected("\n\nIs it?", "Sure?", before=before)
    assert prompts[0].startswith(f"{len(before)} tokens in ")


def test_a_method_holds_less(talk):
    fourier = ["--method", "fourier", "--budget", "0.3", *SEGMENTS]
    _, prompts, _ = talk("x" * 300, "/quit", more=fourier)
    found = re.fullmatch(r"\d+ tokens in ([\d.]+) KiB, dense ([\d.]+) KiB", prompts[1])
    assert float(found[1]) < 0.7 * float(found[2])


def test_an_end_of_turn_is_the_templates(place, talk, expected, tmp_path):
    """The token that ends an answer is not kept: the template has its own."""
    (answer,) = expected("What?")
    other = tmp_path / "ending"
    shutil.copytree(place, other)
    end = {chr(code): code - 30 for code in range(32, 127)}[answer[4]]
    (other / "generation_config.json").write_text(f'{{"eos_token_id": {end}}}')
    result = CliRunner().invoke(app, ["chat", str(other)], input="What?\n/quit\n")
    stopped = answer[: answer.index(answer[4])]
    kept = re.findall(r"\[(\d+) tokens", result.stdout)
    assert int(kept[0]) == len("<user>What?</><assistant>") + len(stopped)


def test_save_and_load_exactly(talk, tmp_path):
    path = tmp_path / "my talk"
    fourier = ["--method", "fourier", "--budget", "0.3", *SEGMENTS]
    question = "y" * 200
    whole, held, _ = talk(question, f"/save '{path}' exact", "And?", more=fourier)
    again, there, said = talk(f"/load '{path}'", "And?")  # its method comes with it
    assert again[1] == whole[2]
    assert there[1:3] == held[2:4]
    assert "exact" in said
    assert look(path).about == {"chat": True, "answered": True}


def test_save_and_load_coded(talk, codecs, tmp_path):
    path = tmp_path / "talk"
    whole, held, said = talk("y" * 300, f"/save {path} 0.15", "And?", more=DENSE)
    assert (look(path).kind, look(path).rows) == ("coded", [int(held[1].split()[0])])
    assert f"{path}: " in said
    again, there, _ = talk(f"/load {path}", "And?", more=DENSE)
    assert there[1:3] == held[2:4]
    assert len(again[1]) == len(whole[2])
    _, there, _ = talk(f"/load {path}", "And?", more=["--method", "fourier", "--budget", "0.3", *SEGMENTS])
    assert there[1] != held[2]  # the talk's own method took it
    assert "is a talk: /load it" in refused("generate", "What?", "--prefix", path, "--max-new-tokens", 2)


def test_a_text_that_generate_kept(place, talk, expected, tmp_path):
    (tmp_path / "text").write_text(TEXT[:90])
    given = ["generate", "What?", "--model", place, "--file", tmp_path / "text", "--max-new-tokens", 2]
    given += ["--method", "dense", "--save-prefix", tmp_path / "kept"]
    assert CliRunner().invoke(app, [str(part) for part in given]).exit_code == 0
    answers, _, _ = talk(f"/load {tmp_path / 'kept'}", "Is it?")
    assert answers[1:2] == expected("\n\nIs it?", before=f"<user>{TEXT[:90]}")


def test_what_goes_wrong_leaves_the_talk(talk, expected, tmp_path):
    (tmp_path / "text").write_text("no talk")
    answers, prompts, said = talk(
        f"/save {tmp_path / 'talk'}",
        "What?",
        f"/load {tmp_path / 'absent'}",
        f"/load {tmp_path / 'text'}",
        f"/save {tmp_path / 'no' / 'folder'} exact",
        f"/save {tmp_path / 'talk'} much",
        "/save",
        "/save 'a",
        "/talk",
        "/quit now",
        "z" * 500,
        "",
        "And?",
    )
    for words in (
        "no token was read",
        "absent",
        "is not a saved cache",
        "there is no folder",
        "a budget is a fraction",
        "/save is followed by PATH [SIZE or exact]",
        "No closing quotation",
        "there is no /talk: /help lists what there is",
        "/quit is followed by nothing",
        "leave no room for an answer in the model's context of 512",
    ):
        assert words in said
    assert [answers[1], answers[-2]] == expected("What?", "And?")
    assert len(set(prompts[2:-1])) == 1
    assert not (tmp_path / "talk").exists()


def test_what_dropped_tokens_is_read_again_to_be_coded(talk, codecs, tmp_path):
    """The file holds the K and V of the model, not what the method left of them."""
    path = tmp_path / "talk"
    streaming = ["--method", "streaming", "-o", "window=40"]
    _, held, said = talk("y" * 300, f"/save {path} 0.15", "And?", more=streaming)
    assert re.search(rf"{path}: [\d.]+ KiB; {int(held[1].split()[0]) + 1} tokens read again in \d+\.\d s\n", said)
    more, there, _ = talk(f"/load {path}", "And?", more=DENSE)
    assert there[1].startswith(f"{int(held[1].split()[0]) + 1} tokens in ")
    assert len(more[1]) == NEW


def test_what_needs_more_than_a_coded_file_has_is_saved_exactly(talk, tmp_path):
    path = tmp_path / "talk"
    h2o = ["--method", "h2o", "--budget", "0.2", "-o", "window=16"]
    _, _, said = talk("y" * 300, f"/save {path}", more=h2o)
    assert "needs more of a text than a coded file has: /save" in said
    assert not path.exists()


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C is pressed when so many tokens of an answer are out, as often as said."""

    def at(token, times=1):
        put, seen = TextStreamer.put, []

        def pressing(self, value):
            put(self, value)
            seen.append(value)
            if len(seen) == token + 1:  # the first is the prompt
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(TextStreamer, "put", pressing)

    return at


def test_ctrl_c_ends_an_answer_and_not_the_talk(talk, expected, interrupted):
    (whole,) = expected("What?")
    interrupted(3)
    answers, prompts, _ = talk("What?", "And?")
    assert whole.startswith(answers[0])
    short = int(prompts[1].split()[0]) - len("<user>What?</><assistant>")
    assert short in (2, 3)
    assert len(answers[1]) == NEW
    assert int(prompts[2].split()[0]) == int(prompts[1].split()[0]) + 1 + len("</><user>And?</><assistant>") + NEW - 1


def test_ctrl_c_twice_forgets_the_question(talk, expected, interrupted, tmp_path):
    """An answer that ends at once leaves layers that differ: what was said before is read again."""
    handler = signal.getsignal(signal.SIGINT)
    interrupted(NEW + 4, times=2)  # within the second answer
    answers, prompts, said = talk("What?", "And what is not?", f"/save {tmp_path / 'talk'} exact", "And?")
    assert [answers[0], answers[-2]] == expected("What?", "And?")
    assert prompts[2] == f"{len('<user>What?</><assistant>') + NEW} tokens to read again"
    assert prompts[3].startswith(f"{len('<user>What?</><assistant>') + NEW} tokens in ")
    assert "this question and its answer are forgotten" in said
    assert signal.getsignal(signal.SIGINT) == handler


def test_an_error_in_an_answer_loses_the_question(talk, expected, monkeypatch):
    """Half an answer is read by then: what was said before is read again."""
    put, seen = TextStreamer.put, []

    def failing(self, value):
        put(self, value)
        seen.append(value)
        if len(seen) == NEW + 4:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB.")

    monkeypatch.setattr(TextStreamer, "put", failing)
    answers, prompts, said = talk("What?", "And what is not?", "And?")
    assert [answers[0], answers[2]] == expected("What?", "And?")
    assert prompts[2] == f"{len('<user>What?</><assistant>') + NEW} tokens to read again"
    assert "longwave: Tried to allocate 9 GiB." in said


def test_ctrl_c_forgets_a_line(talk, expected, monkeypatch):
    typed = iter([KeyboardInterrupt, "What?", EOFError])

    def typing(prompt):
        print(prompt, end="")
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typing)
    answers, _, _ = talk()
    assert answers[1:2] == expected("What?")


def test_what_is_refused_before_the_talk(place, folder, tmp_path):
    (tmp_path / "long").write_text(TEXT)
    assert "exceed this model's context of 512" in refused("chat", place, "--file", tmp_path / "long")
    assert "absent" in refused("chat", place, "--file", tmp_path / "absent")
    assert "give a --temperature" in refused("chat", place, "--top-k", 3)
    assert "the command has one model, and speckv" in refused("chat", place, "--method", "speckv")
    assert "smallest that fourier can do" in refused("chat", place, "--method", "fourier", "--budget", "1KB", *SEGMENTS)


def test_a_talk_beyond_what_the_model_knows(talk):
    far = "infllm:window=32,chunk=16,block=8,blocks=2,sinks=4"
    answers, prompts, said = talk(f"/method {far}", "z" * 700, "Why?", "/method dense", "Who?", more=DENSE)
    assert prompts[:2] == ["nothing read"] * 2
    assert all(int(prompt.split()[0]) > 700 for prompt in prompts[2:])
    assert answers[1]
    assert answers[2]
    assert answers[4]
    assert "tokens of this talk exceed the 512 that dense reads" in said


@pytest.mark.parametrize(
    ("asked", "passes"), [([], {200}), (["--prefill-chunk", 300], {200}), (["--prefill-chunk", 90], {90})]
)
def test_a_method_in_slots_reads_a_long_talk_in_passes(talk, monkeypatch, asked, passes):
    """Whichever method it began with: 312 tokens are held of 512 that the model knows."""
    far = "infllm:window=32,chunk=16,block=8,blocks=2,sinks=4"
    slots = "streaming:tokens=312,window=16,sinks=4,positions=slots"
    given = []
    read = prefix.read_prefix
    monkeypatch.setattr(talks, "read_prefix", lambda *args: (given.append(args[-1]), read(*args))[1])
    answers, _, said = talk(f"/method {far}", "z" * 700, f"/method {slots}", "Why?", more=[*DENSE, *asked])
    assert set(given) == passes
    assert "tokens read again" in said
    assert answers[3]


def test_a_model_without_a_template_goes_on_with_the_text(folder, tokenizer, tmp_path):
    (tmp_path / "text").write_text(TEXT[:60])
    typed = ["chat", folder, "--file", tmp_path / "text", "--no-measure", "--max-new-tokens", 5]
    kept = f"/save {tmp_path / 'talk'} exact\n/load {tmp_path / 'talk'}"
    result = CliRunner().invoke(app, [str(part) for part in typed], input=f"Is it?\n{kept}\nSure?\n")
    assert "no chat template: it goes on with the text that you type" in result.stderr
    model, text, answers = LlamaForCausalLM.from_pretrained(folder), TEXT[:60], []
    for question in ("Is it?", "Sure?"):
        ids = tokenizer(f"{text}\n\n{question}", return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        text = tokenizer.decode(out[0], skip_special_tokens=True)
    shown = re.split(PROMPT, result.stdout)[2::2]
    assert [shown[0].removesuffix("\n"), shown[3].removesuffix("\n")] == answers


KIVI = ["--method", "kivi", "-o", "group=8", "-o", "window=16"]
SNAPKV = ["--method", "snapkv", "--budget", "0.3", "-o", "window=16"]
H2O = ["--method", "h2o", "--budget", "0.3", "-o", "window=16"]
FOURIER = ["--method", "fourier", "--budget", "0.5", *SEGMENTS]


@pytest.mark.parametrize(
    ("before", "order", "how", "after"),
    [
        (DENSE, "/method kivi:group=8,window=16", "settled from the dense cache", KIVI),
        (DENSE, "/method snapkv:budget=0.3,window=16", "settled from the dense cache", SNAPKV),
        (DENSE, "/method h2o:budget=0.3,window=16", "read again", H2O),
        (KIVI, "/method dense", "read again", DENSE),
        (FOURIER, "/budget 0.3", "read again", [*FOURIER, "--budget", "0.3"]),
    ],
    ids=["kivi", "snapkv", "h2o", "dense", "fourier"],
)
def test_another_method_holds_what_was_said(talk, tmp_path, before, order, how, after):
    """As if it had read the text itself; both are told in tokens and seconds."""
    (tmp_path / "text").write_text(TEXT[:250])
    file = ["--file", tmp_path / "text"]
    shown, prompts, said = talk(order, "Is it?", more=[*file, *before])
    there, held, _ = talk("Is it?", more=[*file, *after])
    assert re.search(rf"; {prompts[0].split()[0]} tokens {how} in \d+\.\d s\n", said)
    assert prompts[1:] == held
    assert prompts[0] != prompts[1]
    assert shown[1] == there[0]


def test_a_method_that_cannot_be_loses_nothing(talk, expected):
    orders = ["/method furier", "/method fourier:segmnt=3", "/method speckv", "/method kivi:segment=1", "/budget lots"]
    orders += ["/budget 0.001", "/budget 1KB", "/method dense:budget=0.5", "/budget", "/method a:b"]
    answers, prompts, said = talk("What?", *orders, "/method", "And?")
    for words in (
        "did you mean 'fourier'?",
        "did you mean 'segment'?",
        "the command has one model",
        "segment",
        "'lots'",
        "less than fourier can do",
        "the smallest that fourier can do is",
        "dense keeps everything",
        "/budget is followed by FRACTION or SIZE",
        "an option is NAME=VALUE",
    ):
        assert words in said
    assert len(set(prompts[1:-1])) == 1
    assert [answers[0], answers[-2]] == expected("What?", "And?")


def test_an_exact_file_brings_its_method(talk, tmp_path):
    """And its budget can be changed as that of the talk's own."""
    path = tmp_path / "talk"
    talk("y" * 200, f"/save {path} exact", more=FOURIER)
    _, prompts, said = talk(f"/load {path}", "/method", "/budget 0.2", more=DENSE)
    assert said.count("plan for 0.5") == 2
    assert "tokens read again in" in said
    assert float(prompts[3].split()[3]) < float(prompts[2].split()[3])
    assert float(prompts[1].split()[3]) == float(prompts[2].split()[3])


def test_orders_are_listed(talk):
    _, prompts, said = talk("/help", "/method kivi:group=8", "/bytes", "What?", "/bytes")
    assert prompts[2] == "nothing read"
    assert "\nkivi(K 4 V 4 bits, group=8, sinks=4, window=256)\n" in said
    assert all(f"\n{order}" in said for order in ORDERS)
    assert "\nnothing read\n" in said
    assert "bytes held" in said


def test_sampling_repeats_with_its_seed(talk):
    more = ["--temperature", "1.5", "--seed"]
    first, other = talk("What?", more=[*more, 1])[0], talk("What?", more=[*more, 2])[0]
    assert first == talk("What?", more=[*more, 1])[0] != other
