"""The section of the methods that are the best for their bytes."""

from __future__ import annotations

from longwave.evals.best import compared
from longwave.evals.findings import Findings
from longwave.evals.page import Block, Section, Table
from longwave.evals.sections.cells import point_cells, point_head
from longwave.evals.spec import is_dense
from longwave.evals.words import counted, decimals, plural


def unbeaten(findings: Findings) -> Section:
    """For each task, the methods that nothing beats at their bytes."""
    blocks = []
    for label, task in findings.tasks.items():
        if lines := findings.unbeaten(label):
            exact = [line for line in findings.lines_of(label) if is_dense(line.method)]
            rows = [point_cells(line, decimals(task)) for line in [*exact, *lines]]
            note = f"{len(lines)} of {plural(len(compared(findings.lines_of(label))), 'method')} that have all samples"
            count = counted((line.count for line in lines), "a row")
            blocks.append(
                Block(
                    [Table(point_head(task), rows)], count, findings.commands(label), findings.titles[label], note=note
                )
            )
    text = [
        "Each scores better than every method that held as many bytes or fewer; of many methods on few samples, "
        "some of that is luck: the intervals say how much."
    ]
    return Section("Best for their bytes", blocks, text)
