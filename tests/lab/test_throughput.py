"""benchmarks/throughput.py: the operations that it counts, and that it reports what it measures."""

import json
import runpy

import pytest

from lab.config import CONFIGS, load

BENCHMARK = "benchmarks/throughput.py"


def test_operations_of_the_network(root):
    """DDPM++ of the CIFAR-10 size needs 42.4 GFLOP for an image of 32x32 pixels, according to the literature."""
    forward_flop = runpy.run_path(str(root / BENCHMARK))["forward_flop"]
    assert forward_flop(load(CONFIGS / "edm.yaml")) / 1e9 == pytest.approx(42.4, abs=0.05)


def test_it_reports_speed_and_memory(tiny, script):
    options = ("--batch_sizes", "3", "--repeats", 1, "--json", "report.json", "sampler.guidance=2")
    code, out, err = script(BENCHMARK, "--config_path", tiny, *options)
    assert code == 0, err
    report = json.loads((tiny.parent / "report.json").read_text())
    names = [(row["what"], row["batch_size"]) for row in report["rows"]]
    assert names == [("training", 3), ("sampling", 3)]
    for row in report["rows"]:
        passes = 3 if row["what"] == "training" else 2 * (2 * 3 - 1)  # three steps of Heun's method with guidance
        gflop, seconds = passes * row["batch_size"] * report["forward_gflop"], row["ms"] / 1000
        assert row["gflop_per_s"] == pytest.approx(gflop / seconds)
        assert row["images_per_s"] == pytest.approx(row["batch_size"] / seconds)
        assert row["percent_of_conv"] == pytest.approx(100 * row["gflop_per_s"] / row["conv_gflop_per_s"])
        assert f"{row['ms']:.1f}" in out and row["peak_mb"] > 1


def test_an_impossible_batch_size_is_refused_at_once(tiny, script):
    code, out, err = script(BENCHMARK, "--config_path", tiny, "--batch_sizes", "2,x")
    assert (code, out) == (2, "") and "training.batch_size" in err and err.count("\n") == 1
