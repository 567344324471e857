"""The section of what was set: methods, tasks and runs."""

from __future__ import annotations

from longwave.evals.findings import Findings
from longwave.evals.page import Block, Cell, Section, Table
from longwave.evals.words import NOTHING, options


def settings(findings: Findings) -> Section:
    methods = Table(
        [Cell("method"), Cell("resolved settings")],
        [[Cell(label), Cell(words)] for label, words in findings.header["methods"].items()],
        labels=2,
    )
    tasks = Table(
        [Cell("task"), Cell("version"), Cell("options")],
        [
            [Cell(label), Cell(str(told["version"])), Cell(options(told["options"]))]
            for label, told in findings.header["tasks"].items()
        ],
        labels=3,
    )
    names = ("started", "device", "threads", "batch", "batch_tokens", "limit", "longwave", "torch", "transformers")
    runs = Table(
        [Cell(name.replace("_", " ")) for name in names],
        [
            [Cell(NOTHING if run.get(name) is None else str(run[name])) for name in names]
            for run in findings.header["runs"]
        ],
        labels=2,
    )
    rows = f"n = {len(findings.rows):,} results"
    blocks = [
        Block([methods], rows, findings.commands(), "Methods"),
        Block([tasks], rows, findings.commands(), "Tasks"),
        Block([runs], rows, findings.commands(), "Runs"),
    ]
    signature, template = findings.header.get("signature"), findings.header.get("chat_template")
    text = f"Weights {signature}, chat template {template or 'none'} (the first digits of their hashes)."
    return Section("Settings", blocks, [text])
