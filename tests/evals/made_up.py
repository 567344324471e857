"""Result folders made of chosen numbers, with tasks of every kind the report knows."""

import json
import math
import random
from dataclasses import dataclass
from typing import ClassVar

from longwave.evals.header import FORMAT, VERSION
from longwave.evals.task import LossTask, Task, TextTask

HOSTILE = "<script>alert(1)</script>"
METHODS = (
    "dense",
    "fourier:budget=0.25",
    "fourier:budget=0.5",
    "fourier:budget=0.75,basis=a-very-long-option-value-that-has-to-break-somewhere-on-a-phone",
    f"{HOSTILE}|`*_$x^2$:budget=0.1",
)
SETS = {
    "single-doc QA": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi-doc QA": ("hotpotqa", "2wikimqa"),
    "summaries": ("gov_report", "qmsum", "multi_news"),
    "few-shot": ("trec",),
}


@dataclass(frozen=True)
class Grid(TextTask):
    """Depths and lengths."""

    name: ClassVar[str] = "grid"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "length"
    heat: ClassVar[tuple[str, str]] = ("depth", "length")

    def samples(self, setting):
        return []

    def judge(self, sample, output):
        raise NotImplementedError


@dataclass(frozen=True)
class Sets(Grid):
    """Sets in groups."""

    name: ClassVar[str] = "sets"
    columns: ClassVar[str] = "set"
    heat: ClassVar[None] = None
    groups: ClassVar[dict] = SETS


@dataclass(frozen=True)
class Nats(LossTask):
    """Loss, KL and top-1 beside dense."""

    name: ClassVar[str] = "nats"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "context"
    compares: ClassVar[bool] = True

    def samples(self, setting):
        return []


@dataclass(frozen=True)
class Ppl(Nats):
    """Perplexity."""

    name: ClassVar[str] = "ppl"
    columns: ClassVar[str] = ""
    unit: ClassVar[str] = "perplexity"
    compares: ClassVar[bool] = False

    def total(self, rows):
        return math.exp(sum(row["score"] for row in rows) / len(rows))


TASKS: dict[str, type[Task]] = {task.name: task for task in (Grid, Sets, Nats, Ppl)}


def row(task, method, sample, score, **fields):
    """A result row; fields replace what is usual."""
    usual = {
        "prompt": "0" * 64,
        "tokens": 1000,
        "context": 900,
        "meta": {},
        "metrics": {},
        "prefill_seconds": 4.0,
        "decode_seconds": 2.0,
        "rows": 2,
        "bytes": 2**20,
        "dense_bytes": 2**21,
    }
    return {"task": task, "method": method, "id": sample, **usual, "score": score, **fields}


def text_row(task, method, sample, score, **fields):
    return row(task, method, sample, score, output=HOSTILE, parsed=HOSTILE, new_tokens=8, **fields)


def loss_row(task, method, sample, loss, dense=None, kl=None, top1=None, scored=128, curve=None, **fields):
    metrics = {"loss": loss}
    if dense is not None:
        metrics |= {"dense_loss": dense, "kl": kl, "top1": top1}
    fields = {"scored": scored, "metrics": metrics, "curve": curve or {"loss": [loss, loss]}, **fields}
    return row(task, method, sample, loss, **fields)


def write(folder, rows, tasks=("grid",), methods=("dense", "fourier:budget=0.25"), command=None, **header):
    """A folder of results as the runner leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"--method {method}" for method in methods] + [f"--task {task}" for task in tasks]
    run = {
        "command": command or f"longwave eval run {' '.join(words)} --out {folder.name}",
        "started": "2026-11-24T11:22:37Z",
        "device": "x86_64",
        "threads": 1,
        "batch": 8,
        "batch_tokens": 16384,
        "limit": None,
        "longwave": "0.1.0",
        "torch": "2.9.0",
        "transformers": "5.17.0",
        "python": "3.11.7",
    }
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "model": "tiny",
        "signature": "abcd",
        "dtype": "float32",
        "window": 8192,
        "seed": 42,
        "question": "after",
        "chat": True,
        "chat_template": None,
        "max_tokens": None,
        "methods": {method: f"{method} (all of its options)" for method in methods},
        "tasks": {task: {"name": task.split(":")[0], "version": 1, "options": {}} for task in tasks},
        "runs": [run],
        **header,
    }
    (folder / "run.json").write_text(json.dumps(whole))
    (folder / "samples.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    return folder


LABELS = ("grid", "sets", "nats", "ppl")


def everything(folder, methods=METHODS):
    """All kinds of tables and charts; holes, broken lines and hostile words included."""
    draw = random.Random(0)
    rows = []
    ratios = {method: 1.0 if number == 0 else 0.2 + 0.17 * number for number, method in enumerate(methods)}
    for method in methods:
        drop = 1 - ratios[method]
        held = {"bytes": round(ratios[method] * 2**25), "dense_bytes": 2**25}
        for length in (500, 1000, 2000, 4000, 8000, 16000):
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
                for repeat in range(2):
                    meta = {"length": length, "depth": depth, "repeat": repeat}
                    hit = float(draw.random() > drop * (1.2 - depth))
                    rows.append(text_row("grid", method, f"{length}/{depth}/{repeat}", hit, meta=meta, **held))
        for name in (name for names in SETS.values() for name in names):
            for number in range(8):
                score = draw.random() * (1 - 0.3 * drop)
                rows.append(text_row("sets", method, f"{name}/{number}", score, meta={"set": name}, **held))
        for context in (3000, 7000):
            for number in range(8):
                dense = 3 + draw.random() / 5
                kl = drop * (0.1 + draw.random() / 50)
                curve = {"loss": [dense + kl * i for i in range(4)], "kl": [kl * (1 + i / 8) for i in range(4)]}
                meta = {"context": context, "text": HOSTILE}
                more = dict(scored=256, curve=curve, meta=meta, **held)
                rows.append(loss_row("nats", method, f"{context}/{number}", dense + kl, dense, kl, 1 - kl, **more))
        for number in range(6):
            values = [3.2 + drop * i / 100 + draw.random() / 9 for i in range(40)]
            more = dict(scored=2560, curve={"loss": values}, meta={"utf8_bytes": 11000}, **held)
            rows.append(loss_row("ppl", method, f"book/{number}", sum(values) / 40, **more))
    last = methods[-1]
    rows = [item for item in rows if not (item["method"] == last and item["id"].startswith(("16000/0.5", "qasper")))]
    next(item for item in rows if item["method"] == last and item["task"] == "nats")["score"] = None
    write(folder, rows, LABELS, methods)
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"task": "grid", "met\n')
    return folder
