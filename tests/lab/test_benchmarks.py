"""benchmarks/: the operations that are counted, and that what is reported is what was measured."""

import json
import runpy
import signal

import pytest
import torch

from benchmarks import throughput
from lab.config import CONFIGS, load

BENCHMARK, GPU = "benchmarks/throughput.py", "benchmarks/gpu.py"


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


@pytest.mark.parametrize("name", [BENCHMARK, GPU])
def test_an_impossible_batch_size_is_refused_at_once(name, tiny, script):
    code, out, err = script(name, "--config_path", tiny, "--batch_sizes", "2,x")
    assert (code, out) == (2, "") and "batch_size" in err and err.count("\n") == 1


@pytest.fixture
def measure(script, tiny, tmp_path, monkeypatch):
    """measure("--parts", "speed") -> (exit code, stdout, stderr, the report so far) of gpu.py, at sizes that take a second."""
    monkeypatch.setattr(throughput, "make_references", lambda *where: {name: (1, lambda: None) for name in ("matmul", "conv")})
    monkeypatch.setattr("lab.run.pictures.save_loss_curve", lambda path, *losses: None)
    monkeypatch.setattr("lab.metrics.MIN_STEPS", 1)
    sizes = ("--batch_sizes", 3, "--precisions", "fp16,float32", "--modes", "eager", "--repeats", 1, "--steps", 6, "--seeds", 2)

    def call(*arguments: object) -> tuple[int, str, str, dict]:
        result = script(GPU, "--config_path", tiny, *sizes, *arguments)
        return *result, json.loads((tmp_path / "output/gpu/report.json").read_text())

    return call


def test_every_call_completes_the_report(measure, monkeypatch):
    """What is known is not measured again, what has failed is; a step that runs out of memory does not end the others."""
    training_step = throughput.training_step

    def too_large(config, device):
        if config.training.mixed_precision == "fp16":
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return training_step(config, device)

    with monkeypatch.context() as patch:
        patch.setattr(throughput, "training_step", too_large)
        code, out, err, first = measure("--parts", "speed")
    names = [f"{what}, batch 3, {precision}, eager" for precision in ("fp16", "float32") for what in ("training", "sampling")]
    assert code == 0, err
    assert list(first["parts"]["speed"]) == names
    assert first["parts"]["speed"].pop(names[0])["failed"].startswith("out of memory")
    assert out.count("out of memory") == 1
    for name, row in first["parts"]["speed"].items():
        passes = 3  # of a training step, and of two sampling steps with Heun's method
        gflop, seconds = passes * 3 * first["about"]["forward_gflop"], row["ms"] / 1000
        assert 1000 * row["tflop_per_s"] * seconds == pytest.approx(gflop), name
        assert row["images_per_s"] * seconds == pytest.approx(3), name
        assert row["first_call_s"] > 0 and row["peak_mb"] > 1

    code, out, err, second = measure("--parts", "speed,kernels,precisions", "--lesson")
    parts = second["parts"]
    assert code == 0, err
    assert not any("failed" in row for rows in parts.values() for row in rows.values()), parts
    assert parts["speed"] == {names[0]: parts["speed"][names[0]], **first["parts"]["speed"]}

    (profile,) = parts["kernels"].values()
    percents = [kernel["percent"] for kernel in profile["kernels"]]
    assert percents == sorted(percents, reverse=True) and percents[-1] >= 2 and 20 < sum(percents) <= 100
    assert f"{percents[0]:.1f}%" in out

    (zero, one, half), of = parts["precisions"].values(), ("float32, seed 0", "float32, seed 1", "fp16, seed 0")
    assert list(parts["precisions"]) == [f"{name}, 6 steps" for name in of]
    assert half["difference"] == pytest.approx(half["loss"] - zero["loss"])
    assert half["spread"] == pytest.approx(abs(zero["loss"] - one["loss"])) and half["spread"] > 0
    assert half["within_spread"] == "yes" and half["loss"] != zero["loss"]
    assert parts["lesson"]["distance"]["samples"] > 0

    assert measure("--parts", "speed,kernels,precisions,lesson")[3] == second
    code, out, err, _ = measure("training.learning_rate=1")
    assert (code, out) == (2, "") and "learning_rate" in err and err.count("\n") == 1


def test_a_stopped_lesson_goes_on(measure, at_step, tmp_path, steps_recorded):
    at_step(4, lambda learner: signal.raise_signal(signal.SIGTERM))
    code, out, _, stopped = measure("--parts", "lesson")
    row = stopped["parts"]["lesson"]["training"]
    assert (code, row["failed"]) == (128 + signal.SIGTERM, "stopped") and "stopped" in out
    code, out, err, done = measure("--parts", "lesson")
    assert code == 0, err
    assert steps_recorded(tmp_path / done["parts"]["lesson"]["training"]["run"]) == list(range(1, 7))
    assert "Done: 2 steps" in out and done["parts"]["lesson"]["training"]["minutes"] > row["minutes"]


def test_it_runs_to_its_end_on_a_pretended_gpu(measure, pretended_gpu):
    with pretended_gpu((7, 5)):
        code, _, err, report = measure("--parts", "speed,kernels,precisions", "--precisions", "fp16", "--steps", 2)
    assert code == 0, err
    assert (report["about"]["device"], report["about"]["capability"]) == ("pretended GPU", "7.5")
    assert not any("failed" in row for rows in report["parts"].values() for row in rows.values()), report["parts"]
    assert list(report["parts"]["precisions"]) == ["fp16, seed 0, 2 steps", "fp16, seed 1, 2 steps"]  # a T4's own precision
