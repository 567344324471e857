"""Reading without a GPU: all is read, once, whatever the load."""

import pytest

pytest.importorskip("triton", reason="Triton is for NVIDIA GPUs and Linux; here is none")
from benchmarks import kernels, reading


def test_every_byte_of_the_parts_is_read_once(monkeypatch, capsys):
    steps = []
    monkeypatch.setattr(kernels, "timed", lambda found: steps.append(found) or 2.0)
    monkeypatch.setattr(kernels, "COPIES", 1)
    reading.main(["--cases", "2x3", "--part", "4096"])  # which compares the sums
    assert len(steps) == len(reading.LOADS)
    assert "2x3: 512 bytes under way a warp, 2.0 us, 0.10 TB/s" in capsys.readouterr().out


def test_sums_that_differ_are_not_timed(monkeypatch):
    reader = reading.reader
    monkeypatch.setattr(reading, "reader", lambda pages, *rest: reader(pages + 1, *rest))
    monkeypatch.setattr(kernels, "COPIES", 1)
    with pytest.raises(SystemExit, match="the sums are wrong"):
        reading.main(["--cases", "1x2", "--part", "4096"])


@pytest.mark.parametrize("part", ["100", "32768"])
def test_a_part_that_no_load_fits_is_refused(part, capsys):
    with pytest.raises(SystemExit):
        reading.main(["--part", part])
    assert "--part is a multiple of 4096, 16384 at most" in capsys.readouterr().err
