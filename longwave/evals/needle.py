"""Needle in a haystack: a five-digit number hidden at a depth of a long real text, asked for at the end.

The text with the needle is read and compressed before the question is seen, so every answer token comes from the
compressed cache. Score: 1 if the first run of digits in the answer is the number, else 0. The wording is
the one of six that the dense small model answered best, so that there is something to lose.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from longwave.cache import LongCache
from longwave.evals.fork import fork, prefill

NEEDLE = " The secret number is {key}. Remember it. {key} is the secret number."
QUESTION = "\n\nWhat is the secret number? The secret number is"
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Prompt:
    length: int  # tokens, question included
    depth: float  # share of the text before the needle, 0 to 1
    repeat: int
    key: str
    ids: tuple[int, ...]
    question: int  # how many of the last ids are the question


@dataclass(frozen=True)
class Answer:
    method: str
    length: int
    depth: float
    repeat: int
    key: str
    output: str
    score: float
    bytes_ratio: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def pydoc_haystack() -> str:
    """English prose that every Python carries: the help topics of the language, about 465,000 characters."""
    import pydoc_data.topics

    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def build_prompts(
    tokenizer: PreTrainedTokenizerBase,
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    repeats: int = 1,
    seed: int = 42,
) -> list[Prompt]:
    """Prompts of exactly the given lengths; each repeat has its own stretch of the text and its own key."""
    hay = tokenizer(haystack, add_special_tokens=False, verbose=False).input_ids
    question = tokenizer(QUESTION, add_special_tokens=False).input_ids
    start = (
        []
        if tokenizer.bos_token_id is None or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]
        else [tokenizer.bos_token_id]
    )
    ends = {i for i in set(hay) if str(tokenizer.decode([i])).rstrip().endswith((".", "?", "!"))}
    prompts = []
    for length in lengths:
        for repeat in range(repeats):
            draw = random.Random(f"{seed}/{length}/{repeat}")
            key = f"{draw.randrange(10000, 100000)}"
            needle = tokenizer(NEEDLE.format(key=key), add_special_tokens=False).input_ids
            room = length - len(needle) - len(question) - len(start)
            if room < 16:
                raise ValueError(
                    f"a length of {length} tokens leaves no room for text around the needle; use 128 or more"
                )
            if room > len(hay):
                raise ValueError(
                    f"the haystack has {len(hay)} tokens, too few for a length of {length}: give a longer text"
                )
            offset = draw.randrange(len(hay) - room + 1)
            text = hay[offset : offset + room]
            for depth in depths:
                if not 0 <= depth <= 1:
                    raise ValueError(f"depths are shares from 0 to 1, got {depth}")
                cut = int(room * depth)
                while 0 < cut < room and text[cut - 1] not in ends:  # after the end of a sentence
                    cut -= 1
                ids = (*start, *text[:cut], *needle, *text[cut:], *question)
                prompts.append(Prompt(length, depth, repeat, key, ids, len(question)))
    return prompts


def judge(output: str, key: str) -> float:
    found = re.search(r"\d+", output)
    return float(found is not None and found[0] == key)


def run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    methods: dict[str, Callable[[], LongCache]],
    batch: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Answer]:
    """Ask every method for every needle, greedily. `methods` makes a fresh cache for each name.

    The text is read once and forked to all methods; `batch` prompts of equal length share a pass.
    """
    groups = []
    for length in dict.fromkeys(prompt.length for prompt in prompts):
        same = [prompt for prompt in prompts if prompt.length == length]
        groups += [same[i : i + batch] for i in range(0, len(same), batch)]
    done = 0
    progress(0, len(prompts))
    for group in groups:
        ids = torch.tensor([prompt.ids for prompt in group], device=model.device)
        dense = prefill(model, ids[:, : -group[0].question])
        for name, make in methods.items():
            memory = fork(dense, make())
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=memory,
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            ratio = memory.report().ratio
            for prompt, row in zip(group, out[:, ids.shape[1] :], strict=True):
                text = str(tokenizer.decode(row, skip_special_tokens=True))
                yield Answer(
                    name, prompt.length, prompt.depth, prompt.repeat, prompt.key, text, judge(text, prompt.key), ratio
                )
        done += len(group)
        progress(done, len(prompts))


def grid(answers: Sequence[Answer], method: str) -> tuple[list[int], list[float], list[list[float]]]:
    """(lengths, depths, mean score [depth][length]) of one method."""
    mine = [answer for answer in answers if answer.method == method]
    lengths = sorted({answer.length for answer in mine})
    depths = sorted({answer.depth for answer in mine})
    cells = []
    for depth in depths:
        row = []
        for length in lengths:
            scores = [a.score for a in mine if a.length == length and a.depth == depth]
            row.append(sum(scores) / len(scores) if scores else float("nan"))
        cells.append(row)
    return lengths, depths, cells


def heat_map(answers: Sequence[Answer], path: Path, title: str) -> None:
    """One panel a method, context length across and needle depth down, red for lost and green for found."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(answer.method for answer in answers))
    figure = Figure(figsize=(1.2 + 3.4 * len(methods), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(methods), squeeze=False)[0]
    for panel, method in zip(panels, methods, strict=True):
        lengths, depths, cells = grid(answers, method)
        image = panel.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(
            range(len(lengths)),
            [f"{n / 1000:g}k" if n % 500 == 0 else f"{n / 1024:g}Ki" if n % 512 == 0 else str(n) for n in lengths],
        )
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set_xlabel("context length (tokens)")
        mean = sum(map(sum, cells)) / (len(cells) * len(cells[0]))
        panel.set_title(f"{method}\nfound {mean:.0%}", fontsize=10)
        if panel is panels[0]:
            panel.set_ylabel("needle depth")
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                panel.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=list(panels), label="share found", shrink=0.9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
