"""Faster ways to compute the same function: layout, half precision, torch.compile, GPUs."""

import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from edm.blocks import Block
from edm.precond import EDMPreconditioning, PreconditionedDenoiser
from edm.unet import NETWORKS
from lab.device import autocast, pick_device

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")


@pytest.fixture(params=NETWORKS)
def net(request) -> PreconditionedDenoiser:
    """A small network with random weights, which magnify rounding."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
    model = NETWORKS[request.param](16, 3, **sizes, dropout=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    return PreconditionedDenoiser(model, EDMPreconditioning())


def evaluate(net, memory_format=torch.channels_last, precision=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """D, and the gradient of a loss by all weights, in float64, on the CPU; computed where the network is."""
    device, generator = next(net.parameters()).device, torch.Generator().manual_seed(1)
    images = torch.randn(2, 2, 3, 16, 16, generator=generator)
    x, y = (batch.to(device, memory_format=memory_format) for batch in images)
    with autocast(device, precision):
        D = net(x, torch.tensor([0.2, 3.0], device=device))
    gradients = torch.autograd.grad((D - y).square().sum(), list(net.parameters()))
    return D.detach().cpu().double(), torch.cat([gradient.flatten() for gradient in gradients]).cpu().double()


def distances(ones: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> list[float]:
    return [((one - other).norm() / other.norm()).item() for one, other in zip(ones, others)]


def test_layout_precision_and_compilation_change_no_more_than_rounding_does(net):
    """Half precision by what lab.device.autocast says. Networks are one graph, traced here without the slow compiler itself."""
    contiguous = evaluate(net, torch.contiguous_format)
    expected = evaluate(net.to(memory_format=torch.channels_last))
    assert 0 < max(distances(expected, contiguous)) < 2e-5
    for precision, bounds in ((torch.float16, (0.01, 0.03)), (torch.bfloat16, (0.06, 0.12))):
        errors = distances(evaluate(net, precision=precision), expected)
        assert all(0 < error < bound for error, bound in zip(errors, bounds)), errors
    net.model.compile(backend="eager", fullgraph=True, dynamic=False)
    assert max(distances(evaluate(net), expected)) < 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_float32(train, tiny, last, precision):
    half, single = (
        last(train(tiny, f"training.mixed_precision={name}", "--num_training_steps", 3, output=name))["losses"][:, 0]
        for name in (precision, "no")
    )
    assert half[0].item() == pytest.approx(single[0].item(), rel=0.005)
    torch.testing.assert_close(half, single, rtol=0.1, atol=0)  # Adam's first steps magnify what rounding changes
    assert (half != single).all()


def test_attention_runs_in_the_fast_kernels(monkeypatch):
    """PyTorch's plain formula computes a query, key or value whose features are not side by side, which takes more memory."""

    def fast(q, k, v):
        assert all(part.stride(-1) == 1 for part in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("edm.blocks.scaled_dot_product_attention", fast)
    qkv = torch.randn(2, 96, 4, 4, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    Block(32, 32, 8, attention=True).attend(qkv)


class Toy(torch.nn.Module):
    """A network of one convolution, which a compiler is soon done with."""

    def __init__(self, resolution: int, channels: int, out_channels: int, **options):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x, c_noise, labels, augment_labels):
        return self.conv(x).tanh() * c_noise.exp()[:, None, None, None]


@needs_compiler
def test_a_compiled_run_trains_like_an_eager_one_and_its_checkpoints_are_the_same_kind(train, tiny, last, monkeypatch):
    monkeypatch.setitem(NETWORKS, "ddpmpp", Toy)
    compiled, eager = (
        last(train(tiny, f"training.compile={choice}", "--num_training_steps", 3, output=choice))
        for choice in ("true", "false")
    )
    torch.testing.assert_close(compiled["losses"], eager["losses"], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(compiled["net"], eager["net"], rtol=1e-3, atol=1e-5)
    assert not torch.equal(compiled["net"]["model.conv.weight"], eager["net"]["model.conv.weight"])  # another program


def test_a_compiled_network_that_computes_something_else_is_left_out(train, tiny, last, same, monkeypatch, capsys):
    """Here one whose results are 10% too large. In bf16 that is within the limit."""

    def inexact(graph, inputs):
        return lambda *inputs: [1.1 * output for output in graph(*inputs)]

    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compile(module, backend=inexact, **options))
    for precision, says in (("no", True), ("fp16", True), ("bf16", False)):
        options = (f"training.mixed_precision={precision}", "--num_training_steps", 2)
        eager = last(train(tiny, *options, output=f"eager {precision}"))
        try:
            compiled = last(train(tiny, *options, "training.compile=true", output=precision))
        finally:
            torch.compiler.set_stance("default")
            torch.compiler.reset()
        assert ("The network is not compiled: torch.compile changes D by " in capsys.readouterr().out) == says
        assert same(compiled["losses"], eager["losses"]) == says


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does_compiled_or_not(net):
    expected = evaluate(net)
    net.to(pick_device("cuda"))  # which turns TF32 off
    assert max(distances(evaluate(net), expected)) < 1e-3
    net.model.compile(dynamic=False)
    assert max(distances(evaluate(net), expected)) < 1e-3
