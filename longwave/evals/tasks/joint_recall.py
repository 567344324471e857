"""Joint recall: what a key means depends on the context it stands in (HAX, arXiv 2507.00449), in words.

A text says for each of some contexts what its keys are; then it is said again in another order, and the values are what
counts: the share where the most likely token is the value. The second time is fed, `step` tokens a pass, so earlier
answers stand in the input. One context is plain associative recall. `gaps` puts that many tokens of other text between.

The paper trains models on sequences of token ids; these are words for models that exist ("-like"), each one token with
the space before it, and no score compares with the paper's. The draws are the paper's own.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from longwave.checks import whole
from longwave.evals import data
from longwave.evals.task import LossTask, Sample, Setting, listed

VALUES = 16
MOST = 16  # contexts, and keys of each
WORDS = (
    "air animal apple arm army art baby bag ball band bank base bed bell bird boat body bone book bottle bowl box boy "
    "bread bridge brother building bus camera camp car card cat chair child church city class clock cloud coat coffee "
    "corn cow cup dance day desk dinner doctor dog door dream dress driver ear earth egg engine eye face family farm "
    "father field film fire fish floor flower food foot forest friend fruit game garden gate girl glass gold grass "
    "group hair hall hand hat head heart hill home horse hospital hotel hour house ice island jacket key king kitchen "
    "lake land leaf leg letter library light line lion list lunch machine man map market meat metal milk mind mirror "
    "money moon morning mother mountain mouth music name neck night nose office oil page paint paper park party path "
    "pen phone picture pig plane plant plate police pool queen radio rain ring river road rock roof room root rose "
    "salt sand school sea seat seed ship shirt shoe shop sister skin sky snow soldier song spring star station stone "
    "store street student sugar summer sun table teacher team tooth town train tree truck village voice wall war watch "
    "water wheel wind window wine winter woman wood word world year"
)

Half = list[tuple[int, list[int]]]  # contexts in order, each with its keys in order


@dataclass(frozen=True)
class JointRecall(LossTask):
    """Values that depend on key and context, told and told again in another order (like HAX's joint recall)."""

    name: ClassVar[str] = "joint-recall-like"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "size"
    unit: ClassVar[str] = "% of values recalled"
    lower: ClassVar[bool] = False
    recalls: ClassVar[bool] = True
    metric: ClassVar[str] = "hit"

    contexts: Any = (1, 4, 8)
    keys: Any = (8,)  # of each context
    gaps: Any = (0,)  # tokens between the first time and the second
    repeats: int = 10  # prompts of every size
    step: int = 16  # tokens fed at a time
    haystack: str = "pydoc"  # what a gap is made of: or "essays", or a file

    def __post_init__(self) -> None:
        for name, least, most in (("contexts", 1, MOST), ("keys", 1, MOST), ("gaps", 0, None)):
            object.__setattr__(self, name, listed(getattr(self, name), int, name))
            for size in getattr(self, name):
                if size < least or (most is not None and size > most):
                    raise ValueError(f"{name} are from {least} to {most or 'any number'}, got {size}")
        for name in ("repeats", "step"):
            whole(name, getattr(self, name), 1)

    @property
    def feed(self) -> int | None:
        return self.step

    def samples(self, setting: Setting) -> list[Sample]:
        tokens = single_tokens(setting.tokenizer)
        needed = max(self.contexts) + max(self.keys) + VALUES
        if len(tokens) < needed:
            raise ValueError(
                f"{len(tokens)} of {len(WORDS.split())} words are one token of this tokenizer, and {needed} are "
                "needed: fewer contexts and keys, or another model"
            )
        filler: list[int] = []
        if max(self.gaps):
            text = data.haystack(self.haystack, setting.data)
            filler = setting.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if len(filler) < max(self.gaps):
                raise ValueError(f"the haystack has {len(filler)} tokens, too few for a gap of {max(self.gaps)}")
        made: list[Sample] = []
        for contexts in self.contexts:
            for keys in self.keys:
                for gap in self.gaps:
                    cells = [
                        self._sample(setting, tokens, filler, contexts, keys, gap, repeat)
                        for repeat in range(self.repeats)
                    ]
                    made += setting.limited(cells)
        return made

    def total(self, rows: Sequence[Any]) -> float:
        return 100 * super().total(rows)

    def _sample(
        self, setting: Setting, tokens: list[int], filler: list[int], contexts: int, keys: int, gap: int, repeat: int
    ) -> Sample:
        name = f"{contexts} x {keys}" + (f", {gap:,} between" if gap else "")
        pick = random.Random(f"joint_recall/{name}/{repeat}/{setting.seed}")
        words = pick.sample(tokens, contexts + keys + VALUES)
        mine, their, values = words[:contexts], words[contexts : contexts + keys], words[contexts + keys :]
        told, halves = draw(np.random.RandomState(pick.getrandbits(32)), contexts, keys)

        def mark(text: str) -> list[int]:
            return list(setting.tokenizer(text, add_special_tokens=False).input_ids)

        colon, of, comma, end = mark(":"), mark(" is"), mark(","), mark(".\n")

        def write(half: Half) -> tuple[list[int], list[int]]:
            """Its ids, and where the values stand in them."""
            ids: list[int] = []
            where: list[int] = []
            for context, order in half:
                ids += [*mark("In"), mine[context], *colon]
                for number, key in enumerate(order):
                    ids += [*(comma if number else []), their[key], *of]
                    where.append(len(ids))
                    ids.append(values[told[context][key]])
                ids += end
            return ids, where

        first, _ = write(halves[0])
        again, where = write(halves[1])
        offset = pick.randrange(len(filler) - gap + 1) if gap else 0
        head = [*setting.opening, *first, *filler[offset : offset + gap]]
        asks = mark("\nAgain:\n")
        ids = array("i", [*head, *asks, *again])
        setting.check_fits(len(ids), 0, f"{self.name} at {name}")
        scored = tuple(len(head) + len(asks) + place for place in where)
        meta = {"size": name, "contexts": contexts, "keys": keys, "gap": gap}
        return Sample(f"{name}/{repeat}", ids, len(head), meta=meta, scored=scored)


def single_tokens(tokenizer: Any) -> list[int]:
    """The words that are one token with the space before them."""
    found = (tokenizer(f" {word}", add_special_tokens=False).input_ids for word in WORDS.split())
    return list(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))


def draw(numbers: np.random.RandomState, contexts: int, keys: int) -> tuple[list[list[int]], list[Half]]:
    """Which of 16 values each key has in each context, and twice an order of the contexts and of the keys of each."""
    told = numbers.randint(0, VALUES, (contexts, keys)).tolist()
    halves = [
        [(int(context), numbers.permutation(keys).tolist()) for context in numbers.permutation(contexts)]
        for _ in range(2)
    ]
    return told, halves
