"""Faster ways to compute the same function: layout, half precision, torch.compile, GPUs."""

import shutil

import pytest
import torch

from edm.precond import EDMPreconditioning, PreconditionedDenoiser
from edm.unet import NETWORKS
from lab import checkpoint
from lab.device import autocast

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture(params=NETWORKS)
def net(request) -> PreconditionedDenoiser:
    """A small network with random weights, which magnify rounding."""
    generator = torch.Generator().manual_seed(0)
    model = NETWORKS[request.param](
        16, 3, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,), dropout=0
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    return PreconditionedDenoiser(model, EDMPreconditioning())


def evaluate(net, memory_format=torch.channels_last, precision=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """D, and the gradient of a loss by all weights, in float64."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 3, 16, 16, generator=generator).contiguous(memory_format=memory_format) for _ in range(2))
    with autocast(torch.device("cpu"), precision):
        D = net(x, torch.tensor([0.2, 3.0]))
    gradients = torch.autograd.grad((D - y).square().sum(), list(net.parameters()))
    return D.detach().double(), torch.cat([gradient.flatten() for gradient in gradients]).double()


def distances(ones: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> list[float]:
    return [((one - other).norm() / other.norm()).item() for one, other in zip(ones, others)]


def test_channels_last_computes_the_same_as_contiguous(net):
    expected = evaluate(net, torch.contiguous_format)
    assert 0 < max(distances(evaluate(net.to(memory_format=torch.channels_last)), expected)) < 2e-5


@pytest.mark.parametrize(("precision", "bounds"), [(torch.float16, (0.01, 0.03)), (torch.bfloat16, (0.06, 0.12))])
def test_half_precision_is_as_close_to_float32_as_lab_device_says(net, precision, bounds):
    errors = distances(evaluate(net, precision=precision), evaluate(net))
    assert all(0 < error < bound for error, bound in zip(errors, bounds)), errors


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_float32(train, tiny, last, precision):
    half, single = (
        last(train(tiny, f"training.mixed_precision={name}", "--num_training_steps", 3, output=name))["losses"][:, 0]
        for name in (precision, "no")
    )
    assert half[0].item() == pytest.approx(single[0].item(), rel=0.005)
    torch.testing.assert_close(half, single, rtol=0.1, atol=0)  # Adam's first steps magnify what rounding changes
    assert (half != single).all()


@needs_compiler
def test_a_compiled_run_trains_like_an_eager_one_and_its_checkpoints_are_the_same_kind(train, tiny_grey, last):
    options = ["network.channel_mult=[1]", "network.attn_resolutions=[]", "network.dropout=0", "--num_training_steps", 2]
    compiled, eager = (
        last(train(tiny_grey, *options, f"training.compile={choice}", output=choice)) for choice in ("true", "false")
    )
    torch.testing.assert_close(compiled["losses"], eager["losses"], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert compiled["net"].keys() == eager["net"].keys()
    torch.testing.assert_close(compiled["net"], eager["net"], rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(weight, eager["net"][name]) for name, weight in compiled["net"].items())  # another program


@needs_gpu
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_step_on_a_gpu_never_waits_for_it(train, tiny, at_step, monkeypatch, precision):
    monkeypatch.setattr("lab.losslog.LossLog.flush", lambda log: None)  # which the progress bar calls now and then
    at_step(2, lambda learner: torch.cuda.set_sync_debug_mode("error"))
    at_step(3, lambda learner: torch.cuda.set_sync_debug_mode("default"))
    options = [f"training.mixed_precision={precision}", "training.max_grad_norm=1", "--num_training_steps", 4]
    try:
        train(tiny, *options, "--save_and_sample_every_n", 4, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_gpu_trains_like_the_cpu_compiled_or_not(train, tiny, trained, last):
    """The first step of a run that goes on: the draws are the device's own, so the noise is turned off by its level."""
    del trained
    options = ["training.mixed_precision=no", "network.dropout=0", "loss.P_mean=-15", "loss.P_std=0", "--num_training_steps", 2]
    losses = [
        last(train(tiny, *options, f"training.compile={choice}", output=f"{device} {choice}", device=device))["losses"][:, 0]
        for device, choice in (("cpu", "false"), ("cuda", "false"), ("cuda", "true"))
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=0.1, atol=0)
