"""What a report reads out of a header: short names of tasks, methods by their budgets, the commands that measured."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from longwave.evals.spec import is_dense, parse_spec
from longwave.evals.words import options


def titles(header: dict[str, Any]) -> dict[str, str]:
    """A short name for every task: its own, with the options that tell it from others of the same name."""
    named: dict[str, str] = {}
    for label, told in header["tasks"].items():
        alike = [asked(other) for other in header["tasks"].values() if other["name"] == told["name"]]
        differing = {k: v for k, v in asked(told).items() if any(other.get(k) != v for other in alike)}
        short = {key: value for key, value in differing.items() if not isinstance(value, list)} or differing
        said = f"{told['name']}, {options(short)}" if differing else str(told["name"])
        named[label] = said if len(said) < len(label) or not differing else label
    return {label: said if list(named.values()).count(said) == 1 else label for label, said in named.items()}


def asked(told: dict[str, Any]) -> dict[str, Any]:
    """A task's options, and when its question is seen where the task says so itself."""
    return {**told["options"], **({"question": told["question"]} if "question" in told else {})}


def by_budget(methods: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(title, methods) for every budget, the largest first, and for methods without one; dense leads each of them."""
    found: dict[Any, list[str]] = {}
    for method in methods:
        if not is_dense(method):
            try:
                budget = parse_spec(method)[1].get("budget", "")
            except ValueError:  # of a damaged folder
                budget = ""
            found.setdefault(budget, []).append(method)
    shares: list[Any] = sorted((x for x in found if not isinstance(x, str)), reverse=True)
    sizes = [x for x in found if isinstance(x, str) and x]
    dense = [method for method in methods if is_dense(method)]
    groups = [(f"budget {x}", dense + found[x]) for x in [*shares, *sizes]]
    return groups + ([("no budget", dense + found[""])] if "" in found else [])


def measured_by(header: dict[str, Any], labels: Iterable[str]) -> list[str]:
    """The commands that may have measured these tasks: those that name others with --task have not."""
    wanted = set(labels)
    found = []
    for run in header["runs"]:
        command = run.get("command") or ""
        try:
            words = shlex.split(command)
        except ValueError:
            words = []
        named = {after for word, after in pairwise(words) if word == "--task"}
        named |= {word.removeprefix("--task=") for word in words if word.startswith("--task=")}
        if command and (not named & set(header["tasks"]) or named & wanted):
            found.append(command)
    return list(dict.fromkeys(found)) or ["(run from Python: no command was recorded)"]
