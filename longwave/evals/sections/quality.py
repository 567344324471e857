"""The section of charts: score against bytes, one for each task."""

from __future__ import annotations

from longwave.evals import plots
from longwave.evals.bootstrap import FEWEST
from longwave.evals.findings import Findings
from longwave.evals.page import Block, Section, Table
from longwave.evals.sections.cells import point_cells, point_head
from longwave.evals.spec import is_dense
from longwave.evals.words import counted, decimals, percent


def quality(findings: Findings) -> Section:
    blocks = []
    for index, (label, task) in enumerate(findings.tasks.items()):
        lines = findings.lines_of(label)
        shown = [x for x in lines if not findings.many or x.complete or is_dense(x.method)]
        points = [plots.Point(x.method, x.ratio, x.value, x.interval) for x in shown]
        unit = task.unit + (" (lower is better)" if task.lower else "")
        alt = f"{label}: {unit} against bytes ratio"
        ends = (0.0, 100.0) if percent(task, [x.value for x in lines]) else None
        count = counted((x.count for x in shown), "a point")
        numbers = Table(point_head(task), [point_cells(x, decimals(task)) for x in lines])
        if not points:
            continue
        chart = plots.quality_chart(points, findings.looks, unit, alt, f"quality{index}", ends, findings.lit)
        blocks.append(Block([numbers], count, findings.commands(label), findings.titles[label], chart))
    families: dict[str, str] = {}
    for method in findings.methods:
        if plots.family(method) in findings.lit or is_dense(method):
            families.setdefault(plots.family(method), method)
    legend = [(plots.swatch(findings.looks[method]), name) for name, method in families.items()]
    left = len(set(map(plots.family, findings.methods))) - len(families)
    legend += [(plots.FADED, f"{left} others")] if left else []
    text = [
        f"A point a method, with the bootstrap 95 % interval of its score where {FEWEST} samples or more give one; "
        "points of one family that differ in their budget are joined."
        + (" The dashed line is dense." if findings.has_dense else "")
        + (" Of methods that have all samples; in colour the families most often unbeaten." if findings.many else "")
    ]
    return Section("Quality against bytes", blocks, text, legend)
