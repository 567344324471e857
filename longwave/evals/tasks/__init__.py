"""The tasks, by name. A task is one file and one line here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from longwave.checks import check_options
from longwave.evals.spec import parse_spec
from longwave.evals.task import Task
from longwave.evals.tasks.divergence import Divergence
from longwave.evals.tasks.infinitebench import InfiniteBench
from longwave.evals.tasks.joint_recall import JointRecall
from longwave.evals.tasks.keyvalue import KeyValue, Lines
from longwave.evals.tasks.leval import LEval
from longwave.evals.tasks.longbench import LongBench
from longwave.evals.tasks.longbench2 import LongBench2, LongBench2Like
from longwave.evals.tasks.longicl import LongICL
from longwave.evals.tasks.longproc import LongProc, LongProcTrace
from longwave.evals.tasks.loogle import LooGLE
from longwave.evals.tasks.m4le import M4LE, M4LELike
from longwave.evals.tasks.needle import Needle
from longwave.evals.tasks.needle_threading import NeedleThreading
from longwave.evals.tasks.passkey import Passkey
from longwave.evals.tasks.perplexity import Perplexity
from longwave.evals.tasks.perplexity_bound import PerplexityBound
from longwave.evals.tasks.ruler import Ruler
from longwave.evals.tasks.streaming import Streaming

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Needle,
        Perplexity,
        PerplexityBound,
        Streaming,
        Divergence,
        LongBench,
        LongBench2,
        LongBench2Like,
        LEval,
        InfiniteBench,
        M4LE,
        M4LELike,
        LooGLE,
        Ruler,
        Passkey,
        KeyValue,
        Lines,
        JointRecall,
        NeedleThreading,
        LongICL,
        LongProc,
        LongProcTrace,
    )
}


def get_task(name: str, /, **options: Any) -> Task:
    """A task by name with its options, or an error that suggests the nearest name or option."""
    check_options(name, options, {each: [f.name for f in fields(cls)] for each, cls in TASKS.items()}, "task")
    return TASKS[name](**options)


def parse_task(spec: str) -> Task:
    """ "needle:lengths=1000,2000" -> the task."""
    name, options = parse_spec(spec)
    return get_task(name, **options)


__all__ = ["TASKS", "get_task", "parse_task"]
