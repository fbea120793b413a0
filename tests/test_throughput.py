"""The benchmark: what it counts, and that it runs as the README says."""

import json
import runpy

import pytest
from conftest import ROOT

from edm import config as configs

BENCHMARK = "benchmarks/throughput.py"


@pytest.mark.parametrize("name", ["edm", "edm_cond"])
def test_flops_are_counted_as_in_the_literature(name):
    """A multiply-add as two: DDPM++ of the CIFAR-10 size needs 42.4 GFLOP an image of 32x32 pixels."""
    benchmark = runpy.run_path(str(ROOT / BENCHMARK))
    assert benchmark["forward_flops"](configs.load(ROOT / "configs" / f"{name}.yaml")) / 1e9 == pytest.approx(42.4, abs=0.05)


@pytest.mark.parametrize("tiny", [3], indirect=True, ids=["colour"])
def test_the_benchmark_reports_what_it_prints(tiny, script):
    options = ["--batch_sizes", "2,4", "--repeats", "1", "--json", "figures.json", "training.max_grad_norm=1"]
    code, out, _ = script(BENCHMARK, "--config_path", tiny, "--device", "cpu", *options)
    assert code == 0
    figures = json.loads((tiny.parent / "figures.json").read_text())
    assert figures["machine"]["precision"] == "float32"
    rows = figures["rows"]
    assert [(row["what"], row["batch"]) for row in rows] == [
        ("training", 2),
        ("sampling", 2),
        ("training", 4),
        ("sampling", 4),
    ]
    for row in rows:
        assert f"{row['ms']:.1f}" in out
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["ms"])
        evaluations = 3 if row["what"] == "training" else 2 * 3 - 1  # a step counts as three; Heun's three steps
        flops = evaluations * row["batch"] * figures["machine"]["forward_gflop"] * 1e9
        assert row["tflop_per_s"] == pytest.approx(flops / (row["ms"] / 1000) / 1e12)
        assert row["percent_of_convolution"] > 0
    for row in (rows[0], rows[2]):
        assert sum(row["shares"].values()) == pytest.approx(100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_sizes", "4,x"], "training.batch_size: must be a whole number"),
        (["--batch_sizes", ""], "training.batch_size"),
        (["--device", "tpu"], "is not on this machine"),
    ],
)
def test_what_the_benchmark_cannot_do_is_one_line(tiny, script, arguments, message):
    code, _, err = script(BENCHMARK, "--config_path", tiny, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
