"""countdown: four numbers, a target, and the whole search for three operations that lead from one to the other.

The search goes depth first over pairs and operations and writes down all it tries, until it finds the target. What a
model writes is read by a regular expression and computed with whole numbers, never run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MOST = 2000  # results from here on are dropped
EQUATION = re.compile(r"\s*(\d+)\s*([+\-*/])\s*(\d+)\s*=\s*(\d+)\s*")


@dataclass
class Search:
    """What was tried, line by line, and the equations that led to the target; none where nothing does."""

    target: int
    lines: list[str] = field(default_factory=list)
    equations: list[str] = field(default_factory=list)

    def visit(self, numbers: list[int], depth: int = 1) -> bool:
        for i in range(len(numbers)):
            for j in range(i + 1, len(numbers)):
                one, other = numbers[i], numbers[j]
                left = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
                if left:
                    picked = f"Pick two numbers ({one}, {other}) (numbers left: {left})."
                    self._say(depth, f"{picked} Try possible operations.")
                if self._try(max(one, other), min(one, other), left, depth + 1 if left else depth):
                    return True
        return False

    def _try(self, a: int, b: int, left: list[int], depth: int) -> bool:
        for sign in "+-*/":
            if sign == "/" and b == 0:
                self._say(depth, f"Try {a} / 0 (invalid operation). drop this branch.")
                continue
            if sign == "/" and a % b:
                self._say(depth, f"Try {a} / {b} = {a / b:.1f}. {a / b:.1f} is a decimal, drop this branch.")
                continue
            result = compute(a, sign, b)
            said = f"Try {a} {sign} {b} = {result}."
            if result >= MOST:
                self._say(depth, f"{said} {result} exceeds the maximum intermediate result, drop this branch.")
                continue
            equation = f"{a} {sign} {b} = {result}"
            if not left:
                found = result == self.target
                told = "== {0}, target found!" if found else "!= {0}, drop this branch."
                self._say(depth, f"{said} Evaluate {result} {told.format(self.target)}")
                if found:
                    self.equations = [equation]
                    return True
                continue
            numbers = [result, *left]
            rest = options(numbers) if len(numbers) > 2 else ", just two numbers left."
            now = f"Current number set: {numbers}, target: {self.target}{rest}"
            self._say(depth, f"{said} Add {result} to the number set. {now}")
            if self.visit(numbers, depth + 1):
                self.equations.insert(0, equation)
                return True
        return False

    def _say(self, depth: int, text: str) -> None:
        self.lines.append(f"{' ' * depth}|- {text}")


def compute(a: int, sign: str, b: int) -> int:
    """Of a quotient the whole part, which is all of it where b divides a."""
    return a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a // b


def solves(equations: list[str], numbers: list[int], target: int) -> bool:
    """Whether three equations hold, use the numbers that are there, each once, and end in the target."""
    left = list(numbers)
    for equation in equations:
        told = EQUATION.fullmatch(equation)
        if told is None:
            return False
        a, b, result = int(told[1]), int(told[3]), int(told[4])
        for number in (a, b):
            if number not in left:
                return False
            left.remove(number)
        if (told[2] == "/" and (b == 0 or a % b)) or compute(a, told[2], b) != result:
            return False
        left.append(result)
    return len(equations) == 3 and left == [target]


def options(numbers: list[int]) -> str:
    pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :]]
    return f". Options for choosing two numbers: {pairs}."


def trace(numbers: list[int], target: int) -> str | None:
    """The whole of what a model is to write, None where no operations lead to the target."""
    search = Search(target)
    if not search.visit(numbers):
        return None
    first, before, last = search.equations
    return "\n".join(
        [
            "# Search Procedure",
            f"Initial number set: {numbers}, target: {target}{options(numbers)}",
            *search.lines,
            "",
            "Now we have found the target, let's trace back the solution:",
            f"Final step: {last}",
            f"The step before: {before}",
            f"The first step: {first}",
            "",
            "Output the solution in the required format:",
            "<Solution>",
            *search.equations,
            "</Solution>",
            "",
        ]
    )
