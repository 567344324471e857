import pytest

from tests.evals import made_up
from tests.evals.made_up import loss_row
from tests.evals.reports import FOURIER, Page, report, tables

pytestmark = pytest.mark.usefixtures("made_up_tasks")


def test_loss_table(tmp_path):
    more = dict(meta={"context": 7000}, curve={"loss": [3.2, 3.3], "kl": [0.2, 0.3]}, scored=100)
    rows = [loss_row("nats", "dense", str(i), 3.0, 3.0, 0.0, 1.0, **more) for i in range(6)]
    rows += [loss_row("nats", FOURIER, str(i), 3.25, 3.0, 0.25, 0.875, **more) for i in range(6)]
    html, markdown = report(made_up.write(tmp_path, rows, tasks=("nats",)))
    assert [FOURIER, "7,000", "0.500", "6", "3.250", "+0.250 / ✗ worse", "0.2500", "87.5"] in Page(html).rows
    assert ["dense", "7,000", "0.500", "6", "3.000", "–", "0.0000", "100.0"] in Page(html).rows
    assert ["1 to 64", "0.2000"] in Page(html).rows  # the curve; dense has no KL from itself
    assert ["65 to 100", "0.3000"] in Page(html).rows
    assert any(["65 to 100", "0.3000"] in table for table in tables(markdown))


def test_perplexity_table(tmp_path):
    rows = [loss_row("ppl", "dense", "a", 2.0, meta={"utf8_bytes": 512}), loss_row("ppl", FOURIER, "a", 3.0)]
    html, _ = report(made_up.write(tmp_path, rows, tasks=("ppl",)))
    assert ["dense", "0.500", "1", "7.389", "2.000", "–", "0.7213"] in Page(html).rows
    assert [FOURIER, "0.500", "1", "20.086", "3.000", "+1.000", "–"] in Page(html).rows


def test_long_curves_are_thinned_in_their_table(tmp_path):
    curve = {"loss": [float(i) for i in range(40)]}
    rows = [loss_row("ppl", "dense", "a", 2.0, curve=curve, scored=2560)]
    html, _ = report(made_up.write(tmp_path, rows, tasks=("ppl",), methods=("dense",)))
    assert ["1 to 192", "1.000"] in Page(html).rows
    assert ["2,497 to 2,560", "39.000"] in Page(html).rows
