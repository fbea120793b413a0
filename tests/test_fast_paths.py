"""The fast paths compute the same function as the plain ones, within the bounds that their docstrings state."""

import copy
import dataclasses
import math
import shutil
import time

import pytest
import torch
from conftest import ROOT, write_config
from reference import fill, wave
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from edm import compiling, generate
from edm import config as configs
from edm.blocks import Block, dropout
from edm.device import autocast
from edm.learner import Learner
from edm.precond import Denoiser, EDMPreconditioning
from edm.unet import NETWORKS

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")


def network(architecture: str = "ddpmpp", **options) -> Denoiser:
    options = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,), **options}
    return fill(Denoiser(NETWORKS[architecture](16, 3, dropout=0.0, **options), EDMPreconditioning())).float()


def pass_through(net: Denoiser, memory_format=torch.channels_last, precision=torch.float32) -> list[torch.Tensor]:
    """D and the gradients of a loss, in float64."""
    x = wave(2, 3, 16, 16, scale=0.7, frequency=0.7, phase=0.3).float().contiguous(memory_format=memory_format)
    with autocast(CPU, precision):
        D = net(x, torch.tensor([0.2, 3.0]))
    loss = ((D - wave(2, 3, 16, 16, scale=0.5, frequency=0.3, phase=1)).square()).sum()
    return [part.double() for part in (D.detach(), *torch.autograd.grad(loss, list(net.parameters())))]


def distances(ones: list[torch.Tensor], others: list[torch.Tensor]) -> tuple[float, float]:
    """The relative distance of D, and of all gradients together."""
    (D, *gradients), (other, *others) = ones, others
    gradients, others = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, others))
    return ((D - other).norm() / other.norm()).item(), ((gradients - others).norm() / others.norm()).item()


@pytest.mark.parametrize("architecture", NETWORKS)
def test_channels_last_computes_the_same_as_contiguous(architecture):
    net = network(architecture)
    same = pass_through(net, torch.contiguous_format)
    assert 0 < max(distances(pass_through(net.to(memory_format=torch.channels_last)), same)) < 2e-5


@pytest.mark.parametrize("architecture", NETWORKS)
@pytest.mark.parametrize(("precision", "bounds"), [(torch.float16, (0.01, 0.03)), (torch.bfloat16, (0.06, 0.12))])
def test_half_precision_computes_almost_the_same_as_float32(architecture, precision, bounds):
    net = network(architecture)
    errors = distances(pass_through(net, precision=precision), pass_through(net))
    assert all(0 < error < bound for error, bound in zip(errors, bounds))


@pytest.mark.parametrize("architecture", NETWORKS)
def test_what_is_done_in_place_without_gradients_changes_nothing_else(architecture):
    net = network(architecture).eval()
    x = wave(2, 3, 16, 16, scale=0.7, frequency=0.7, phase=0.3).float()
    with_gradients, before = net(x, 1.0), x.clone()
    with torch.no_grad():
        without = net(x, 1.0)
    assert torch.equal(x, before)
    assert torch.equal(with_gradients, without)


@needs_compiler
def test_compiled_computes_the_same_as_eager():
    net = network(channel_mult=(1,), attn_resolutions=(16,))
    compiled = copy.deepcopy(net)
    assert compiling.compile_network(compiled.model, lambda: pass_through(compiled), cuda_graphs=False)
    ours, same = pass_through(compiled), pass_through(net)
    assert max(distances(ours, same)) < 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(ours, same))  # it was another program
    assert compiled.state_dict().keys() == net.state_dict().keys()
    forward = compiled.model.forward
    assert compiling.compile_network(compiled.model, lambda: None, cuda_graphs=False)
    assert compiled.model.forward is forward


def test_attention_is_given_what_the_fast_kernels_want(monkeypatch):
    """A query, key or value whose features are not side by side would be computed by PyTorch's plain formula."""

    def fast(q, k, v):
        assert all(part.stride(-1) == 1 for part in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("edm.blocks.scaled_dot_product_attention", fast)
    qkv = torch.randn(2, 96, 4, 4, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    out = Block(32, 32, 8, attention=True).attend(qkv)
    q, k, v = (qkv[:, role::3].flatten(2).transpose(1, 2) for role in range(3))
    plain = ((q @ k.mT / math.sqrt(32)).softmax(-1) @ v).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "dtype"), [((64, 32, 32, 32), torch.float32), ((301, 3, 33, 31), torch.float64)])
def test_dropout_keeps_the_mean_and_drops_each_feature_on_its_own(memory_format, shape, dtype):
    torch.manual_seed(0)
    x = torch.full(shape, 3.0, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    out = dropout(x, 0.3)
    deviation = math.sqrt(0.3 * 0.7 / x.numel())
    kept = out != 0
    assert kept.double().mean().item() == pytest.approx(0.7, abs=4 * deviation)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 3 / 0.7), rtol=1e-4, atol=0)
    together = (kept[..., 1:] & kept[..., :-1]).double().mean().item(), (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert together == pytest.approx((0.49, 0.49), abs=8 * deviation)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, out.detach() / 3)
    assert (dropout(x, 0.3) != out).any()


@pytest.mark.parametrize("probability", [0.0, 1e-9, 0.999999])
def test_dropout_at_its_ends(probability):
    x = torch.ones(1001, dtype=torch.bfloat16)
    out = dropout(x, probability)
    assert out.dtype == x.dtype
    assert out.isfinite().all()
    assert (out == x).all() if probability < 0.5 else (out == 0).float().mean() > 0.99


@pytest.mark.parametrize(
    ("choice", "device", "times", "decided", "wanted"),
    [
        ("true", "cpu", 1, False, True),
        ("false", "cuda", 10**6, True, False),
        ("auto", "cpu", 10**6, True, False),
        ("auto", "cuda", 10**6, None, True),
        ("auto", "cuda", 1000, None, False),
        ("auto", "cuda", 10**6, False, False),
        ("auto", "cuda", 10, True, True),
    ],
)
def test_what_is_compiled(choice, device, times, decided, wanted, monkeypatch):
    """Where one time takes 10 milliseconds, and the first 2 seconds: what would take ten minutes."""
    monkeypatch.setattr("edm.compiling.wait_for", lambda device: None)
    durations = iter([2, 0.01])
    assert compiling.is_wanted(choice, torch.device(device), lambda: time.sleep(next(durations)), times, decided) == wanted


@pytest.mark.parametrize(
    ("device", "parameters", "accumulation", "processes", "graphs"),
    [("cuda", 10**6, 1, 1, True), ("cuda", 10**8, 1, 1, False), ("cuda", 10**6, 2, 1, False), ("cuda", 10**6, 1, 2, False)],
)
def test_cuda_graphs_are_for_small_networks_whose_gradients_nothing_else_needs(
    device, parameters, accumulation, processes, graphs
):
    assert compiling.is_launch_bound(torch.device(device), parameters, accumulation, processes) == graphs
    assert not compiling.is_launch_bound(CPU, parameters, accumulation, processes)


@pytest.mark.parametrize("architecture", NETWORKS)
def test_each_network_is_one_graph_and_beyond_the_compilers_limits_it_says_that_it_is_not_compiled(
    architecture, monkeypatch, capsys
):
    """The compiler keeps so many programs of one function; what does not fit must not be taken for compiled."""
    compile = torch.compile
    monkeypatch.setattr("torch.compile", lambda forward, mode, **options: compile(forward, backend="eager", **options))
    torch.compiler.reset()
    outcomes = []
    for size in range(1, 10):
        net = network(architecture, channel_mult=(1,), attn_resolutions=(16,), num_blocks=1).eval()
        x = torch.zeros(size, 3, 16, 16)
        outcomes.append(compiling.compile_network(net.model, lambda net=net, x=x: net(x, 1.0), cuda_graphs=False))
    torch.compiler.reset()
    assert outcomes[0]
    assert not outcomes[-1]
    assert outcomes == sorted(outcomes, reverse=True)
    assert capsys.readouterr().out.count("Not compiled, which is slower and else the same: ") == outcomes.count(False)


def failing(function, **options):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\nand so on")

    return fail


def test_what_cannot_be_compiled_runs_as_it_is(tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.setattr("torch.compile", failing)
    config = configs.load(write_config(tmp_path, image_folder, channels=1), ["training.compile=true"])
    learner, plain = Learner(config, CPU), Learner(config, CPU)
    learner.compile(steps=10, decided=None)
    assert "Not compiled, which is slower and else the same: no compiler\n" in capsys.readouterr().out
    assert learner.state_dict()["compiled"] is False
    images, labels = torch.full((4, 1, 8, 8), 200, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    assert learner.step(images, labels, 1)[0] == plain.step(images, labels, 1)[0]


def test_a_run_compiles_as_it_has_decided_before(tiny, script, monkeypatch):
    """The stand-in for torch.compile counts its calls, and computes the same."""
    calls = []
    monkeypatch.setattr("torch.compile", lambda function, **options: calls.append(options) or function)
    train = ["train_mnist.py", "--config_path", tiny]
    assert script(*train, "--num_training_steps", "3", "training.compile=true")[0] == 0
    assert calls == [{"dynamic": False, "fullgraph": True, "mode": None}]
    checkpoint = torch.load("output/image/image_folder/tiny/diffusion-3.pt", weights_only=True)
    assert checkpoint["compiled"] is True
    decisions = []
    monkeypatch.setattr("edm.learner.is_wanted", lambda *arguments: decisions.append(arguments) or False)
    assert script(*train, "--resume_from", "latest")[0] == 0
    assert script(*train, "--overwrite")[0] == 0
    assert [(choice, device, *rest) for choice, device, rehearse, *rest in decisions] == [
        ("auto", CPU, 3, True),
        ("auto", CPU, 6, None),
    ]


def test_samples_of_a_compiled_network_are_those_of_seeds(tiny, script, monkeypatch):
    """Full batches alone are computed, and the images are the same."""
    sizes = set()

    def compiled(forward, **options):
        return lambda x, *args: (sizes.add(len(x)), forward(x, *args))[1]

    monkeypatch.setattr("torch.compile", compiled)
    assert script("train_mnist.py", "--config_path", tiny, "--num_training_steps", "1")[0] == 0
    sample = [
        "sample.py",
        "--checkpoint",
        "output/image/image_folder/tiny/diffusion-1.pt",
        "--seeds",
        "0-6",
        "--batch_size",
        "3",
    ]
    for choice in ("true", "false"):
        assert script(*sample, "--compile", choice, "--output_dir", choice)[0] == 0
        assert script(*sample, "--gif", "--guidance", "2", "--compile", choice, "--output_dir", f"{choice} guided")[0] == 0
    assert sizes == {3}
    for name in ("", " guided"):
        one, other = ((tiny.parent / f"{choice}{name}" / "grid.png").read_bytes() for choice in ("true", "false"))
        assert one == other
    one, other = ((tiny.parent / f"{choice} guided" / "reverse.gif").read_bytes() for choice in ("true", "false"))
    assert one == other


def test_auto_takes_the_batch_that_memory_allows(monkeypatch):
    """A GPU on which an image takes 3 MB, 100 MB are free, and 20 MB more kept by PyTorch for what comes."""
    config, used = configs.load(ROOT / "configs" / "quickstart.yaml"), []
    assert generate.largest_batch_size(torch.nn.Identity(), config, CPU, torch.float32) == 64

    def denoiser(x, sigma):
        used.append(len(x))

    monkeypatch.setattr("torch.zeros", lambda *shape, device: torch.ones(shape))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 10e6)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 30e6)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 10e6 + 3e6 * used[-1])
    for free, expected in ((100e6, 16), (1e6, 4), (0, 4), (100e9, 512)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, 0))
        assert generate.largest_batch_size(denoiser, config, torch.device("cuda"), torch.float32) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_step_on_a_gpu_never_waits_for_it(tiny, precision):
    config = configs.load(tiny, [f"training.mixed_precision={precision}", "training.max_grad_norm=1"])
    learner = Learner(config, torch.device("cuda"))
    images = torch.zeros(4, config.data.channels, 8, 8, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(4, dtype=torch.int64, device="cuda")
    learner.step(images, labels, 1)
    try:
        torch.cuda.set_sync_debug_mode("error")
        learner.step(images, labels, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_gpu_computes_what_the_cpu_does_compiled_or_not():
    config = configs.load(ROOT / "configs" / "edm_small.yaml", ["training.mixed_precision=no"])
    images = torch.randint(0, 256, (16, 1, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    drawn = Learner(config, CPU).draw(images, torch.arange(16) % 10, step=1)
    gradients = []
    for device, choice in (("cpu", "false"), ("cuda", "false"), ("cuda", "true")):
        training = dataclasses.replace(config.training, compile=choice)
        learner = Learner(dataclasses.replace(config, training=training), torch.device(device))
        fill(learner.net).float()
        learner.compile(steps=10, decided=None)
        assert compiling.is_compiled(learner.net.model) == (choice == "true")
        learner.optimizer.zero_grad()
        learner.backward({key: part.to(device) for key, part in drawn.items()})
        gradients.append(torch.cat([parameter.grad.flatten().cpu() for parameter in learner.net.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-3 * gradients[0].norm()
