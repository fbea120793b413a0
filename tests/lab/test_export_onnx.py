"""A denoiser exported to ONNX computes what it computes in PyTorch."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from lab import checkpoint, export_onnx
from lab import config as configs
from lab.build import build_network
from lab.cli import UserError
from lab.config import CONFIGS, Config
from lab.generate import load_denoiser

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

TINY = [
    "data.dataset=image_folder",
    "data.root=images",
    "data.resolution=8",
    "network.model_channels=16",
    "network.channel_mult=[1, 2]",
    "network.num_blocks=1",
    "network.attn_resolutions=[4]",
]


def make_denoiser(architecture: str, formulation: str, *overrides: str):
    """Return a tiny denoiser with random weights, and its config."""
    names = [f"network.architecture={architecture}", f"preconditioning.formulation={formulation}"]
    config = configs.load(CONFIGS / "edm.yaml", [*TINY, *names, "preconditioning.sigma_data=0.5", *overrides])
    torch.manual_seed(0)
    denoiser = build_network(config).eval().requires_grad_(False)
    for parameter in denoiser.parameters():  # new networks return almost 0
        parameter += 0.05 * torch.randn_like(parameter)
    return denoiser, config


def check(data: bytes, denoiser, config: Config, sigmas: list[float], tolerance: float) -> None:
    """Assert that D of an ONNX file is PyTorch's, for one image and for seven, each with its own noise level and class."""
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    classes, size = config.network.label_dim, config.data.resolution
    generator = torch.Generator().manual_seed(0)
    for batch_size in (1, 7):
        sigma = torch.tensor(sigmas).repeat(7)[:batch_size]
        x = torch.randn(batch_size, config.data.channels, size, size, generator=generator) * sigma[:, None, None, None]
        inputs = {"x": x, "sigma": sigma}
        if classes:
            inputs["labels"] = one_hot(torch.arange(batch_size) % classes, classes).float()
        D = torch.from_numpy(session.run(["D"], {name: tensor.numpy() for name, tensor in inputs.items()})[0])
        amplification = denoiser.preconditioning.c_out(sigma).abs().clamp(min=1)
        assert ((D - denoiser(**inputs)).abs().amax(dim=(1, 2, 3)) <= tolerance * amplification).all()


@pytest.mark.parametrize(
    ("architecture", "formulation", "classes", "sigmas"),
    [
        ("adm", "vp", 0, [0.002, 0.3, 150.0]),
        ("ncsnpp", "ve", 3, [0.02, 0.3, 100.0]),
    ],
)
def test_networks(architecture, formulation, classes, sigmas):
    if architecture == "adm" and torch.__version__.startswith("2.6."):
        pytest.skip("PyTorch 2.6 cannot export torch.addcmul for any batch size")
    channels = "data.channels=3" if classes else "data.channels=1"
    denoiser, config = make_denoiser(architecture, formulation, f"network.label_dim={classes}", channels)
    data, _, difference = export_onnx.export(denoiser, config)
    assert difference <= export_onnx.TOLERANCE
    check(data, denoiser, config, sigmas, export_onnx.TOLERANCE)


def test_the_page_has_the_network_of_the_assets(root):
    data = (root / "playground" / "edm_small.onnx").read_bytes()
    config, denoiser, _ = load_denoiser(root / "assets" / "edm_small.safetensors", None, [], torch.device("cpu"))
    check(data, denoiser, config, [0.002, 0.02, 0.2, 2.0, 20.0, 80.0], 1e-5)
    found = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    sizes = {"resolution": "32", "channels": "1", "classes": "10"}
    assert found == {"name": "edm_small", **sizes, "sigma_min": "0.002", "sigma_max": "80.0"}


def test_half_precision_only_where_it_is_good_enough(monkeypatch):
    denoiser, config = make_denoiser("ddpmpp", "edm")
    model = export_onnx.to_onnx(denoiser, config)
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *arguments: copy.deepcopy(model))  # it takes 8 seconds
    exact = export_onnx.largest_difference(model.SerializeToString(), denoiser, config)
    small, precision, difference = export_onnx.export(denoiser, config)
    check(small, denoiser, config, [0.002, 0.3, 80.0], export_onnx.TOLERANCE)
    assert precision == "half precision" and 2 * exact < difference <= export_onnx.TOLERANCE
    monkeypatch.setattr(export_onnx, "TOLERANCE", math.sqrt(exact * difference))
    large, precision, difference = export_onnx.export(denoiser, config)
    assert precision == "float32" and difference == exact and len(large) > 1.3 * len(small)
    monkeypatch.setattr(export_onnx, "TOLERANCE", exact / 2)
    with pytest.raises(UserError, match="nothing was written"):
        export_onnx.export(denoiser, config)


def test_command(script, trained, tmp_path):
    code, out, err = script("lab/export_onnx.py", "--checkpoint", trained, "--output", tmp_path / "new" / "tiny.onnx")
    assert (code, err) == (0, "") and out.count("\n") == 1 and "D differs from PyTorch's by at most" in out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny.onnx"]


def test_refusals(script, trained, tmp_path, monkeypatch):
    def refused(path: Path, output: str = "no.onnx") -> str:
        code, out, err = script("lab/export_onnx.py", "--checkpoint", path, "--output", tmp_path / output)
        assert (code, out, err.count("\n")) == (2, "", 1) and not (tmp_path / output).exists()
        return err

    assert "does not end in .onnx" in refused(trained, "no.pt")
    assert "there is no checkpoint" in refused(tmp_path / "none.pt")
    denoiser, config = make_denoiser("ddpmpp", "iddpm", "loss.noise_distribution=iddpm", "loss.weighting=iddpm")
    weights = denoiser.state_dict()
    checkpoint.save(tmp_path / "i.pt", {"step": 0, "name": "i", "config": config.to_dict(), "ema": weights})
    assert "iddpm knows only some noise levels" in refused(tmp_path / "i.pt")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install -r requirements-dev.txt" in refused(trained)
