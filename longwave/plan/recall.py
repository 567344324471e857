"""Windows to measure on: stretches of text, and text with facts hidden in it that are asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

NAMES = (  # noqa: SIM905
    "harbor lantern copper meadow falcon granite velvet cinder orchid saddle timber walnut anchor barley "
    "comet dagger ember garnet hazel ivory jasper kettle linen marble nickel onyx pepper quartz raven "
    "silver"
).split()
# (what the text says, what is asked, the answer)
FACTS = (
    ("\nThe access code of the {name} room is {value}.\n", "\nThe access code of the {name} room is", " {value}"),
    ("\n{name}_limit = {value}\n", "\n{name}_limit =", " {value}"),
)
HIDDEN = 8  # facts a window


@dataclass(frozen=True)
class Windows:
    """Rows of equal length: `context` tokens to compress, then the tokens to score.

    ids int64 [rows, context + scored + 1]. weight float [rows, scored]: what each scored token counts, rows sum to 1.
    recall bool [rows]: rows that ask for hidden facts; only their answers count.
    """

    ids: torch.Tensor
    context: int
    weight: torch.Tensor
    recall: torch.Tensor

    def part(self, rows: slice) -> Windows:
        return Windows(self.ids[rows], self.context, self.weight[rows], self.recall[rows])


def windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int,
    scored: int,
    prose: int,
    recall: int,
    seed: int = 0,
) -> Windows:
    """`prose` rows of running text and `recall` rows with `HIDDEN` facts in it, texts taken in turn, each read evenly.

    Kinds alternate, so that any first part of the rows holds both.
    """
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    need = context + scored + 1
    for number, ids in enumerate(encoded):
        if len(ids) < need:
            raise ValueError(
                f"text number {number + 1} has {len(ids)} tokens, fewer than one window of {context} and {scored} "
                "scored: give longer text or a smaller window"
            )
    draw = random.Random(seed)
    rows: list[tuple[list[int], list[float], bool]] = []
    taken = []  # (kind, text) of every row
    turns = {False: 0, True: 0}
    for hides in _alternate(prose, recall):
        taken.append((hides, turns[hides] % len(encoded)))
        turns[hides] += 1
    for number, (hides, text) in enumerate(taken):
        ids, place, of = encoded[text], taken[:number].count((hides, text)), taken.count((hides, text))
        start = (len(ids) - need) * (2 * place + 1) // (2 * of)
        part = ids[start : start + need]
        rows.append(hide(tokenizer, part, context, draw) if hides else (part, [1.0] * scored, False))
    weight = torch.tensor([row[1] for row in rows])
    return Windows(
        torch.tensor([row[0] for row in rows]),
        context,
        weight / weight.sum(-1, keepdim=True),
        torch.tensor([row[2] for row in rows]),
    )


def _alternate(prose: int, recall: int) -> list[bool]:
    """False for prose, True for recall, spread evenly."""
    marks = [((2 * i + 1) / count, hides) for count, hides in ((prose, False), (recall, True)) for i in range(count)]
    return [hides for _, hides in sorted(marks)]


def hide(
    tokenizer: PreTrainedTokenizerBase, text: list[int], context: int, draw: random.Random
) -> tuple[list[int], list[float], bool]:
    """A stretch of text with facts written into its first `context` tokens, and questions and answers after it."""

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False).input_ids

    scored = len(text) - context - 1
    facts = [
        (draw.choice(FACTS), {"name": name, "value": str(draw.randrange(10000, 100000))})
        for name in draw.sample(NAMES, HIDDEN)
    ]
    said = [encode(fact[0].format(**words)) for fact, words in facts]
    room = context - sum(map(len, said))
    if room < HIDDEN:
        raise ValueError(f"a window of {context} tokens is too short to hide {HIDDEN} facts in it")
    cuts = sorted(draw.randrange(room) for _ in said)
    made: list[int] = []
    last = 0
    for cut, sentence in zip(cuts, said, strict=True):
        made += text[last:cut] + sentence
        last = cut
    made += text[last:room]
    tail: list[int] = []
    counted: list[float] = []
    for fact, words in draw.sample(facts, len(facts)):
        question, answer = encode(fact[1].format(**words)), encode(fact[2].format(**words))
        if len(tail) + len(question) + len(answer) > scored + 1:
            break
        tail += question + answer
        counted += [0.0] * len(question) + [1.0] * len(answer)
    if not tail:
        raise ValueError(f"{scored} scored tokens are too few for one question and its answer: score 64 or more")
    filler = scored + 1 - len(tail)
    return made + tail + text[room : room + filler], (counted + [0.0] * filler)[1:], True
