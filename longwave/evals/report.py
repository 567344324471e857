"""Result folders as one page: report.html, a single file that needs no network, and report.md with the same facts.

Both are made from the same sections of tables and charts, behind a headline. Under each of them stand the samples
counted and the commands that measured them. Whatever comes out of a results folder is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longwave.evals.best import headline
from longwave.evals.findings import Findings
from longwave.evals.page import render
from longwave.evals.results import merge
from longwave.evals.sections.detail import detail
from longwave.evals.sections.loss import loss
from longwave.evals.sections.overview import overview
from longwave.evals.sections.quality import quality
from longwave.evals.sections.settings import settings
from longwave.evals.sections.speed import speed
from longwave.evals.sections.unbeaten import unbeaten
from longwave.evals.task import LossTask
from longwave.evals.words import plural


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write report.html and report.md into the folder `out`; several folders of results are shown as one."""
    if not folders:
        raise ValueError("name at least one folder of results")
    loaded = merge(folders)
    where = ", ".join(map(str, folders))
    if not loaded.rows:
        raise ValueError(f"{where}: no results yet, there is nothing to report; start `longwave eval run` with it")
    findings = Findings(loaded)
    if not findings.lines:
        raise ValueError(f"{where}: none of {len(loaded.rows)} results has a score that is a finite number")
    html, markdown = render(contents(findings))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the report")
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "report.html", out / "report.md"]
    for path in paths:
        if path.exists() and "longwave eval" not in path.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{path} is not a report of longwave eval: name another folder, nothing was overwritten")
    for path, text in zip(paths, (html, markdown), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def contents(findings: Findings) -> dict[str, Any]:
    """What the templates show."""
    header, runs = findings.header, findings.header["runs"]
    samples = len({(row["task"], row["id"]) for row in findings.rows})
    cut = f", prompts cut to {header['max_tokens']:,} tokens" if header.get("max_tokens") else ""
    window = f"a window of {header['window']:,} tokens" if header.get("window") else "no stated window"
    window += f" (rotary tables extended by {header['extension']})" if header.get("extension") else ""
    lead = (
        f"{plural(samples, 'sample')} of {plural(len(findings.tasks), 'task')}, the same for "
        f"{plural(len(findings.methods), 'method')}: model {header['model']} in "
        f"{header['dtype']} on {'; '.join(distinct(runs, 'device'))}, seed {header['seed']}, {window}{cut}, chat "
        f"template {'used where the protocol has one' if header['chat'] else 'not used'}. "
    )
    lead += {
        "after": 'Question "after" (query-agnostic): the context is compressed before the question is seen.',
        "inside": 'Question "inside" (query-aware): the question is compressed with its context.',
        "with": 'Question "with": context and question are read in one exact pass before anything is compressed.',
    }.get(header["question"], f"Question {header['question']!r}.")
    if own := [findings.titles[label] for label in findings.tasks if findings.question(label) != header["question"]]:
        lead += f" Otherwise where a task says so: {'; '.join(own)}."
    days = sorted({str(run.get("started", ""))[:10] for run in runs} - {""})
    versions = [
        f"{name} {' / '.join(distinct(runs, name))}"
        for name in ("longwave", "torch", "transformers", "python")
        if distinct(runs, name)
    ]
    whole, bytes_of = overview(findings), quality(findings)
    first = unbeaten(findings) if findings.many else None
    sections = [first, bytes_of, whole] if first is not None and first.blocks else [whole, bytes_of]
    for label, task in findings.tasks.items():
        if isinstance(task, LossTask):
            sections.append(loss(findings, label, task))
        elif (made := detail(findings, label, task)).blocks:
            sections.append(made)
    when = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "at an unknown date"
    return {
        "title": f"Long-context evaluation of {header['model']}",
        "headline": headline(
            header["model"], samples, {x: findings.lines_of(x) for x in findings.tasks}, findings.tasks, findings.titles
        ),
        "lead": lead,
        "facts": f"Measured {when} with {', '.join(versions)}.",
        "notes": findings.notes,
        "sections": [*sections, speed(findings), settings(findings)],
    }


def distinct(runs: Sequence[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(str(run[name]) for run in runs if run.get(name)))
