"""Sums over result rows, against numbers worked out by hand."""

import dataclasses
import math

import pytest

from longwave.evals import summary, tasks
from longwave.evals.results import load
from tests.evals import made_up
from tests.evals.made_up import loss_row, text_row
from tests.evals.reports import grid_row

pytestmark = pytest.mark.usefixtures("made_up_tasks")


def lines_of(folder, rows, **header):
    made = summary.summarise(load(made_up.write(folder, rows, **header)))
    return {(line.method, line.column): line for line in made}


def test_scores_and_differences(tmp_path):
    rows = [grid_row("dense", str(i), 1.0) for i in range(4)]
    rows += [grid_row("fourier:budget=0.25", str(i), score) for i, score in enumerate((1.0, 0.5, 0.0, 0.0))]
    lines = lines_of(tmp_path, rows)
    assert set(lines) == {("dense", "500"), ("fourier:budget=0.25", "500")}  # one set: no line of all sets
    dense, other = lines["dense", "500"], lines["fourier:budget=0.25", "500"]
    assert (dense.value, dense.low, dense.high, dense.over) == (100, 100, 100, None)
    assert other.value == 37.5
    assert other.over == -62.5
    assert other.low <= other.value <= other.high
    assert other.over_low < other.over < other.over_high < 0
    assert other.pairs == 4
    assert other.verdict == ""  # four pairs say nothing yet


def test_all_sets_together_come_first_and_columns_are_ordered_as_numbers(tmp_path):
    rows = [grid_row("dense", f"{n}", n / 16000, length=n) for n in (16000, 500, 4000)]
    made = summary.summarise(load(made_up.write(tmp_path, rows)))
    assert [line.column for line in made] == ["", "500", "4000", "16000"]
    assert made[0].value == pytest.approx(100 * (20500 / 16000) / 3)


def test_sets_come_in_the_order_of_their_groups(tmp_path):
    names = ["trec", "unheard of", "qasper", "narrativeqa"]
    rows = [text_row("sets", "dense", name, 1.0, meta={"set": name}) for name in names]
    assert summary.sorted_columns(made_up.Sets(), rows) == ["narrativeqa", "qasper", "trec", "unheard of"]


def test_bytes_ratio_weighs_samples_by_their_bytes(tmp_path):
    rows = [
        grid_row("dense", "a", 1.0, bytes=10, dense_bytes=100),
        grid_row("dense", "b", 1.0, bytes=90, dense_bytes=100),
    ]
    rows.append(grid_row("dense", "c", 1.0, bytes=100, dense_bytes=800))
    assert lines_of(tmp_path, rows)["dense", "500"].ratio == 0.2


def test_significant_loss_is_found(tmp_path):
    rows = [grid_row(m, str(i), float(m == "dense")) for m in ("dense", "fourier:budget=0.25") for i in range(6)]
    line = lines_of(tmp_path, rows)["fourier:budget=0.25", "500"]
    assert (line.over, line.over_low, line.over_high, line.verdict) == (-100, -100, -100, "worse")
    assert line.as_dict()["verdict"] == "worse"


def test_missing_and_non_finite_samples_make_a_line_incomplete(tmp_path):
    rows = [grid_row("dense", str(i), 1.0) for i in range(4)]
    rows += [grid_row("fourier:budget=0.25", "0", 1.0), grid_row("fourier:budget=0.25", "1", None)]
    rows += [grid_row("fourier:budget=0.25", "2", math.nan), grid_row("fourier:budget=0.25", "more", 0.0)]
    lines = lines_of(tmp_path, rows)
    dense, other = lines["dense", "500"], lines["fourier:budget=0.25", "500"]
    assert (dense.count, dense.expected, dense.complete) == (4, 5, False)
    assert (other.count, other.expected, other.pairs, other.value, other.over) == (2, 5, 1, 50, 0)


def test_totals_of_their_own_are_resampled_whole(tmp_path):
    rows = [loss_row("ppl", "dense", str(i), loss) for i, loss in enumerate((1.0, 3.0))]
    line = lines_of(tmp_path, rows, tasks=("ppl",))["dense", ""]
    assert line.value == pytest.approx(math.exp(2))
    assert (line.low, line.high) == (pytest.approx(math.e), pytest.approx(math.exp(3)))


def test_cost_counts_each_pass_once():
    passes = [text_row("grid", "dense", str(i), 1.0, context=900, rows=4, prefill_seconds=8.0) for i in range(4)]
    passes.append(text_row("grid", "dense", "4", 1.0, context=400, rows=1, prefill_seconds=2.0))
    cost = summary.cost(passes)
    assert cost.prefill == (4 * 900 + 400) / (8 + 2)
    assert cost.decode == 5 * 8 / (2 + 2)
    assert (cost.count, cost.bytes, cost.dense_bytes, cost.ratio) == (5, 2**20, 2**21, 0.5)


def test_cost_without_times():
    assert summary.cost([text_row("grid", "dense", "0", 1.0, prefill_seconds=0.0)]).prefill is None


def test_losses_use_the_dense_loss_in_the_rows():
    rows = [loss_row("nats", "m", str(i), 3.5 + i, 3.0 + i, kl=0.1 * i, top1=0.5) for i in range(6)]
    made = summary.losses(rows, [], "seed")
    assert (made.loss, made.over, made.over_low, made.over_high) == (6.0, 0.5, 0.5, 0.5)
    assert (made.pairs, made.verdict, made.top1, made.bits_per_byte) == (6, "worse", 0.5, None)
    assert made.kl == pytest.approx(0.25)


def test_losses_use_the_dense_rows_otherwise_and_weigh_by_tokens():
    meta = {"utf8_bytes": 600}
    rows = [
        loss_row("ppl", "m", "a", 2.0, meta=meta, scored=100),
        loss_row("ppl", "m", "b", 4.0, meta=meta, scored=300),
    ]
    dense = [loss_row("ppl", "dense", "a", 1.5)]
    made = summary.losses(rows, dense, "seed")
    assert (made.loss, made.over, made.pairs, made.kl) == (3.5, 0.5, 1, None)
    assert made.bits_per_byte == pytest.approx(3.5 * 400 / math.log(2) / 1200)
    assert summary.losses(dense, dense, "seed").over is None


def test_curves_are_averaged_as_far_as_all_go():
    rows = [{"curve": {"loss": [1.0, 2.0, 9.0]}}, {"curve": {"loss": [3.0, 4.0]}}, {"curve": {"loss": [None]}}, {}]
    assert summary.curve(rows, "loss") == [2.0, 3.0]
    assert summary.curve(rows, "kl") == []


def test_other_versions_and_unknown_tasks_are_refused(tmp_path, monkeypatch):
    loaded = load(made_up.write(tmp_path, [grid_row("dense", "a", 1.0)]))
    monkeypatch.setattr(made_up.Grid, "version", 2)
    with pytest.raises(ValueError, match="version 1 of grid, this longwave has 2"):
        summary.summarise(loaded)
    monkeypatch.delitem(tasks.TASKS, "grid")
    with pytest.raises(ValueError, match="'grid' that this longwave does not have"):
        summary.summarise(dataclasses.replace(loaded))


def test_a_killed_run_is_not_complete(tmp_path):
    rows = [grid_row("dense", str(n), 1.0) for n in range(3)]
    folder = made_up.write(tmp_path, rows, methods=("dense",), samples={"grid": {"500": 50, "900": 10}})
    (made,) = summary.summarise(load(folder))
    assert (made.column, made.count, made.expected, made.complete) == ("500", 3, 50, False)
