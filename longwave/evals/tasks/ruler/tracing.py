"""vt: variables assigned to each other in a chain, scattered over noise; all that share the value are asked for."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from longwave.evals.tasks.ruler.maker import SHORT, Drawn, Maker, Source

EXAMPLE_TOKENS = 500


class Tracing(Maker):
    """One chain, and one solved example with shorter names before it. Every prompt has its own example."""

    units = "lines"

    def __init__(self, source: Source, parameters: Mapping[str, Any], length: int):
        self.hops = parameters["num_hops"]
        self.noise = source.text("noise")
        self.template = source.template("variable_tracking")
        self.least = self.hops + 1
        self.step = 10 if length >= SHORT else 5
        self.example = self.least
        while source.setting.count(self._example(random.Random(0), self.example + 1)) <= EXAMPLE_TOKENS:
            self.example += 1

    def draw(self, draw: random.Random, size: int, index: int) -> Drawn:
        task = self._task(draw, size, letters=5)
        example = self._example(draw, self.example)
        return Drawn(f"{example}\n\n{task.prompt}", task.question, task.prefix, task.answers)

    def _example(self, draw: random.Random, size: int) -> str:
        solved = self._task(draw, size, letters=3)
        return f"{solved.prompt}{solved.prefix} {' '.join(solved.answers)}"

    def _task(self, draw: random.Random, size: int, letters: int) -> Drawn:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(draw.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        value = draw.randrange(10000, 99999)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {later} = VAR {earlier} " for earlier, later in pairwise(names)]
        lines = [self.noise] * size
        places = sorted(draw.sample(range(size), len(chain)))
        for statement, place in reversed(list(zip(chain, places, strict=True))):  # in the order of the chain
            lines.insert(place, statement)
        return self.template.fill("\n".join(lines), names, {}, query=value, num_v=len(names))
