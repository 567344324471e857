"""A talk as somebody types it: in a terminal, with its keys."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from transformers import LlamaForCausalLM

from tests.cli.test_chat import place  # noqa: F401  (the model of these talks)

PROMPT = re.compile(r"\[([^\]\n]*)\] > $")
ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])")
BAR = re.compile(r"\r[^\n]*reading [\d,]+ tokens [^\n]*(\n\r)?")
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"

TYPED = """
from pathlib import Path
from longwave.cli.typed import history, lines
with history(Path({path!r})):
    for line in lines(lambda: "held"):
        print("got", line)
print("the end")
"""
TALK = """
import time
from pathlib import Path
from transformers import TextStreamer
put, seen = TextStreamer.put, []
def slowly(self, value):
    put(self, value)
    seen.append(value)
    if len(seen) == 5:  # the question and four tokens
        Path({under_way!r}).touch()
    time.sleep(0.05)
TextStreamer.put = slowly
import torch
torch.cpu.get_capabilities = dict  # so that the saved model is loaded as it is, in float32
from longwave.cli import app
app({arguments!r})
"""


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, code, home):
        self.ours, theirs = pty.openpty()
        known = {**os.environ, "LONGWAVE_HOME": str(home), "TERM": "xterm", "COLUMNS": "120"}
        own = dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_control)
        self.program = subprocess.Popen([sys.executable, "-c", code], env=known, **own)
        os.close(theirs)
        self.seen = ""

    def until(self, pattern, seconds=60):
        """What it prints up to where `pattern` is found at the end."""
        began, raw, self.seen = time.monotonic(), "", ""
        while not re.search(pattern, self.seen):
            assert time.monotonic() - began < seconds, self.seen
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    part = os.read(self.ours, 65536).decode(errors="ignore")
                except OSError:  # it ended
                    part = ""
                assert part, self.seen
                raw += part
                self.seen = BAR.sub("", ESCAPE.sub("", raw).replace("\r\n", "\n"))
        return self.seen

    def say(self, line):
        """Type a line; (what it prints, its next prompt)."""
        self.press(f"{line}\n")
        shown = self.until(PROMPT)
        answer, prompt = re.split(r"\[(?=[^\]\n]*\] > $)", shown)
        return answer.removeprefix(f"{line}\n"), prompt.removesuffix("] > ")

    def press(self, key):
        if key == CTRL_C:
            time.sleep(0.3)  # one that comes while readline works on what came before waits for the next key
        os.write(self.ours, key.encode())

    def end(self):
        """Its exit code, and all that it printed to its end."""
        try:
            while part := os.read(self.ours, 65536).decode(errors="ignore"):
                self.seen += part
        except OSError:  # all is read
            pass
        os.close(self.ours)
        return self.program.wait(30), self.seen


def _control():
    """The terminal is this program's, so that its keys are; they mean something though what runs tests ignores them."""
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def start(code):
        opened.append(Terminal(code, tmp_path / "home"))
        opened[-1].until(PROMPT)
        return opened[-1]

    yield start
    for each in opened:
        if each.program.poll() is None:
            each.program.kill()
            each.program.wait()


def test_a_talk(terminal, place, tokenizer, tmp_path):  # noqa: F811
    """Many turns; an answer that Ctrl-C ends is part of the talk as far as it was printed; the talk is kept, taken up,
    and held otherwise."""
    arguments = ["chat", str(place), "--no-measure", "--max-new-tokens", "40"]
    there = terminal(TALK.format(under_way=str(tmp_path / "under way"), arguments=arguments))
    there.press("What is blue?\n")
    while not (tmp_path / "under way").exists():
        assert there.program.poll() is None
        time.sleep(0.02)
    there.press(CTRL_C)
    first, held = there.until(PROMPT).split("\n", 1)[1].rsplit("\n[", 1)
    first = first.replace("^C", "")
    assert 4 <= len(first) < 30
    before = len("<user>What is blue?</><assistant>")
    assert int(held.split()[0]) == before + len(first) - 1  # the last is read with the next question

    second, held = there.say("And what is not?")
    text = f"<user>What is blue?</><assistant>{first}</><user>And what is not?</><assistant>"
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = LlamaForCausalLM.from_pretrained(place).generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert second.removesuffix("\n") == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    talk = tmp_path / "talk"
    assert f"{talk}: " in there.say(f"/save {talk} exact")[0]
    said, kivi = there.say("/method kivi:group=8,window=16")
    assert "tokens read again in" in said
    assert kivi.split(" in ")[0] == held.split(" in ")[0]
    assert kivi != held
    _, half = there.say("/method fourier:budget=0.5,segment=16,window=16")
    said, less = there.say("/budget 0.3")
    assert "plan for 0.3" in said
    assert float(less.split()[3]) < float(half.split()[3])
    said, same = there.say("/method furier")
    assert "did you mean 'fourier'?" in said
    assert same == less
    assert there.say(f"/load {talk}")[1] == held
    there.press("/quit\n")
    assert there.end()[0] == 0
    assert "And what is not?" in (tmp_path / "home" / "chat-history").read_text()


def test_keys(terminal, tmp_path):
    there = terminal(TYPED.format(path=str(tmp_path / "home" / "typed")))
    assert there.say("What?")[0] == "got What?\n"
    there.press("half a li")
    there.until("half a li$")
    there.press(CTRL_C)
    assert "Ctrl-C once more, Ctrl-D or /quit ends the talk" in there.until(PROMPT)
    assert there.say("And?")[0] == "got And?\n"  # and the next Ctrl-C is the first again
    there.press(CTRL_C)
    there.until(PROMPT)
    there.press(CTRL_C)
    code, shown = there.end()
    assert code == 0
    assert shown.endswith("the end\r\n")
    assert "Traceback" not in shown


def test_lines_are_there_the_next_time(terminal, tmp_path):
    pytest.importorskip("readline")
    path = tmp_path / "home" / "typed"
    there = terminal(TYPED.format(path=str(path)))
    for line in ("What?", "And?"):
        there.say(line)
    there.press(CTRL_D)
    code, shown = there.end()
    assert code == 0
    assert shown.endswith("the end\r\n")
    assert path.stat().st_mode & 0o077 == 0
    again = terminal(TYPED.format(path=str(path)))
    again.press(UP + UP + "\n")
    assert "got What?\n" in again.until(PROMPT)


def test_a_python_without_readline_has_a_talk(terminal, tmp_path):
    there = terminal("import sys; sys.modules['readline'] = None\n" + TYPED.format(path=str(tmp_path / "typed")))
    assert there.say("What?")[0] == "got What?\n"
    there.press(CTRL_D)
    assert there.end()[0] == 0
    assert not (tmp_path / "typed").exists()
