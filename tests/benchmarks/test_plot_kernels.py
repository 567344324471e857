"""The plot of a made-up measurement, with holes in it as a real one may have."""

import json

import pytest

from benchmarks import plot_kernels


def made_up(contexts=(4, 8, 16, 32, 64, 128, 256), batches=(1, 2, 4, 8, 16, 32)):
    rows, rivals = [], []
    for k in contexts:
        for batch in batches:
            full = 12 + 1.35 * k * batch
            for layout, share, fixed in (("a", 0.34, 11), ("b", 0.22, 14)):
                us = fixed + share * 1.35 * k * batch
                cell = {"batch": batch, "context": 1024 * k, "layout": layout, "full_us": full, "us": us}
                if (batch, k) != (32, 256):
                    rows.append(cell | {"ratio": full / us, "of_copy": 0.7 * (us - fixed) / us})
        if k <= 128:
            for name, us in (("rebuild, period", 30 + 9 * k), ("rebuild, segments", 20 + 2.2 * k), ("cuFFT", 70 + k)):
                rivals.append({"batch": 1, "context": 1024 * k, "name": name, "us": us})
    about = {"device": "made-up GPU", "torch": "0.0", "copy_bytes_per_s": 2.4e12}
    return about | {"rows": rows, "rivals": rivals, "skipped": []}


@pytest.mark.parametrize("found", [made_up(), made_up((8,), (1,)) | {"rivals": []}], ids=["grid", "one case"])
def test_a_picture_is_made(found, tmp_path):
    measured = tmp_path / "kernels.json"
    measured.write_text(json.dumps(found))
    plot_kernels.main([str(measured)])
    assert "<svg" in measured.with_suffix(".svg").read_text()


def test_the_committed_measurement_can_be_drawn(tmp_path):
    """Some cases of the grid, an older copy."""
    plot_kernels.main(["docs/results/kernels/h200.json", "--out", str(tmp_path / "old.png")])


def test_nothing_measured_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="nothing was measured"):
        plot_kernels.plot(made_up() | {"rows": []}, tmp_path / "no.png")
