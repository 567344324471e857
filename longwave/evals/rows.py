"""What a result row says of its sample and of what it cost, whichever kind of model was measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from longwave.evals.task import Sample
from longwave.frame import Report

BIN = 64  # scored positions averaged to one point of a curve


def about(sample: Sample) -> dict[str, Any]:
    """What a result row says of its sample."""
    told = {
        "id": sample.id,
        "prompt": sample.prompt_sha256,
        "tokens": len(sample.ids),
        "context": sample.context,
        "meta": dict(sample.meta),
    }
    if sample.answers:
        told["answers"] = list(sample.answers)
    if sample.cut_from is not None:
        told["cut_from"] = sample.cut_from
    return told


def share_bytes(report: Report, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Each row's share, by its tokens, of the bytes that its pass holds, and of those of a dense cache."""
    each = report.dense_nbytes / (report.batch * report.tokens)  # a token of a dense cache
    whole = report.nbytes / sum(tokens)
    return [
        {"bytes": round(whole * count), "dense_bytes": round(each * count), "rows": report.batch} for count in tokens
    ]


class Clock:
    """Seconds since the last look, work on the device included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.look()

    def look(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        passed = now - getattr(self, "_last", now)
        self._last = now
        return passed
