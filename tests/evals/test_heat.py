from longwave.evals import heat
from tests.evals import made_up
from tests.evals.reports import grid_row


def test_heat_has_every_cell_that_any_method_has():
    rows = [grid_row("dense", "a", 1.0, 500, 0.0), grid_row("dense", "b", 0.0, 500, 0.0)]
    rows += [grid_row("dense", "c", 1.0, 4000, 0.5), grid_row("m", "a", 0.5, 500, 0.0)]
    made = heat.heat(made_up.Grid(), rows, "m")
    assert (made.rows, made.columns) == (["0", "0.5"], ["500", "4,000"])
    assert made.values == [[50, None], [None, None]]
    assert (made.counts, made.expected) == ([[1, 0], [0, 0]], [[2, 0], [0, 1]])
