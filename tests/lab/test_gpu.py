"""All commands on a pretended CUDA GPU (tests/pretended_gpu.py): nothing mixes devices, no training step waits for the GPU."""

import contextlib

import pytest
import torch

import train_mnist
from lab import learner
from lab.cli import UserError
from lab.config import CONFIGS
from lab.device import pick_device
from lab.run import Run

NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
GPUS = {"T4": ((7, 5), torch.float16), "A100": ((8, 0), torch.bfloat16), "P100": ((6, 0), torch.float32)}
SMALL = """
    data.dataset=image_folder data.resolution=8 network.model_channels=8 network.channel_mult=[1] network.num_blocks=1
    network.attn_resolutions=[8] training.batch_size=4 training.num_training_steps=2 training.save_and_sample_every_n=2
    chain.num_timesteps=25 sampler.num_samples=4 sampler.sampling_steps=1
"""
ALL_AT_ONCE = """
    network.channel_mult=[1,2] network.attn_resolutions=[4] network.label_dim=2 network.augment_dim=9
    data.augment_probability=0.5 training.accumulation=2 training.max_grad_norm=1
    sampler.sampling_steps=2 sampler.S_churn=1 sampler.clip=true
"""


@pytest.fixture
def gpu_run(train, pretended_gpu, image_folder, monkeypatch, at_step):
    """gpu_run("edm", "T4", *overrides) -> (the last checkpoint, the precision, what the second step waited for)."""
    monkeypatch.setattr("lab.losslog.LossLog.flush", lambda log: None)  # which fetches losses for the progress bar now and then
    monkeypatch.setattr("lab.metrics.MIN_STEPS", 1)  # of training the classifier

    def call(config: str, gpu: str, *overrides: object):
        found, is_due, generator_for = {}, Run.is_due, train_mnist.generator_for

        def begin(*seed, device):
            if seed[1:] == ("step", 2):
                pretended.waits.clear()
            return generator_for(*seed, device=device)

        def end(run, step):
            found.setdefault(step, list(pretended.waits))
            return is_due(run, step)

        monkeypatch.setattr(train_mnist, "generator_for", begin)
        monkeypatch.setattr(Run, "is_due", end)
        at_step(1, lambda learner: found.update(precision=learner.precision))
        with pretended_gpu(GPUS[gpu][0]) as pretended:
            path = CONFIGS / f"{config}.yaml"
            folder = train(path, *SMALL.split(), f"data.root={image_folder}", *overrides, device="cuda")
        return folder / "diffusion-2.pt", found.get("precision"), found.get(2)

    return call


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("config", NAMES)
def test_every_config_trains_and_is_evaluated(gpu_run, script, pretended_gpu, config, gpu):
    checkpoint, precision, waits = gpu_run(config, gpu)
    assert precision == GPUS[gpu][1]
    assert not waits
    bound = ["--timesteps", 2] if config.startswith(("ddpm", "iddpm")) else []
    commands = {
        "lab/evaluate.py": ["--num_samples", 4, "--num_images", 1, "--ode_steps", 1, *bound],
        "lab/gallery.py": ["filmstrip", "--seeds", 0],
    }
    with pretended_gpu(GPUS[gpu][0]):
        for command, arguments in commands.items():
            code, _, err = script(command, *arguments, "--checkpoint", checkpoint, "--mixed_precision", "auto")
            assert code == 0, err


@pytest.mark.parametrize(("architecture", "gpu"), [("ddpmpp", "T4"), ("ncsnpp", "A100"), ("adm", "P100")])
def test_all_options(gpu_run, script, pretended_gpu, architecture, gpu):
    checkpoint, _, waits = gpu_run("edm_cond", gpu, f"network.architecture={architecture}", *ALL_AT_ONCE.split())
    assert not waits
    with pretended_gpu(GPUS[gpu][0]):
        options = ("--num_samples", 3, "--batch_size", 2, "--gif", "--mixed_precision", "auto")
        code, _, err = script("sample.py", "--checkpoint", checkpoint, *options)
        assert code == 0, err


@pytest.mark.parametrize("picture", ["grid", "trajectories", "neighbours", "classes", "guidance"])
def test_all_pictures(gpu_run, script, pretended_gpu, picture):
    checkpoint, _, _ = gpu_run("edm_cond", "T4", "network.label_dim=2")
    with pretended_gpu(GPUS["T4"][0]):
        options = ("--seeds", 0, "--mixed_precision", "auto", "sampler.sampling_steps=2")
        code, _, err = script("lab/gallery.py", picture, "--checkpoint", checkpoint, *options)
        assert code == 0, err


def test_random_masks_and_importance_do_not_wait(gpu_run):
    _, _, waits = gpu_run("iddpm", "T4", "network.label_dim=10", "loss.label_dropout=0.5", "training.accumulation=2")
    assert not waits


def plus(value):
    """Return a loss of (D, y) to which `value(D)` is added."""
    return lambda D, y: (D - y).flatten(1).sum(dim=1) + value(D)


FAULTS = {  # what is planted into train_mnist.py, and what the pretended GPU says to it
    "a constant on the CPU": ("build_weighting", lambda config: lambda sigma: torch.ones(len(sigma)), "device"),
    "labels on the CPU": ("one_hot", lambda labels, number: torch.zeros(len(labels), number), "device"),
    "a generator of the CPU": ("generator_for", lambda *seed, device: torch.Generator(), "a generator on cpu"),
    "a boolean mask": ("squared_error", plus(lambda D: D[D > 0].sum()), "depends on data"),
    "item": ("squared_error", plus(lambda D: D.sum().item()), "a number in <lambda>, test_gpu.py"),
    "a copy to the CPU": ("squared_error", plus(lambda D: D.sum().cpu()), "a copy to the CPU in <lambda>, test_gpu.py"),
    "a copy to the GPU": (
        "squared_error",
        plus(lambda D: torch.ones(4).to("cuda")),
        "a copy to the GPU in <lambda>, test_gpu.py",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_pretended_gpu_notices(gpu_run, monkeypatch, fault):
    name, replacement, message = FAULTS[fault]
    monkeypatch.setattr(train_mnist, name, replacement)
    try:
        _, _, found = gpu_run("edm_cond", "T4")
    except RuntimeError as error:
        found = error
    assert message in str(found)


def test_resumed_moments_have_the_layout_of_their_weights(gpu_run, monkeypatch):
    """Which Adam's fused kernel relies on, whatever layout the file has."""
    checkpoint, _, _ = gpu_run("edm", "T4")
    resume, restore = ("--resume_from", checkpoint), learner.like_parameter
    for steps, mend in ((3, restore), (4, lambda moments, parameter: moments)):

        def from_contiguous(moments: dict, parameter: torch.Tensor, mend=mend) -> dict:
            return mend({name: moment.contiguous() for name, moment in moments.items()}, parameter)

        monkeypatch.setattr(learner, "like_parameter", from_contiguous)
        with (
            contextlib.nullcontext() if mend is restore else pytest.raises(RuntimeError, match="same dtype, device, and layout")
        ):
            gpu_run("edm", "T4", *resume, f"training.num_training_steps={steps}")


def gpus(monkeypatch, capability: tuple[int, int], built_for: list[str]) -> None:
    """Let this machine seem to have two GPUs, and a PyTorch that was built for some."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: built_for)


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    """So that what names no device, such as torch.cuda.synchronize, is about this one."""
    current = []
    gpus(monkeypatch, (8, 0), [])
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert pick_device() == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("capability", "built_for", "is_supported"),
    [
        ((7, 0), "sm_75 sm_80 sm_90 compute_120", False),
        ((7, 0), "sm_60 sm_70", True),
        ((8, 6), "sm_75 sm_80 sm_90", True),
        ((8, 0), "sm_75 sm_86", False),
        ((10, 3), "sm_90 compute_90", True),
        ((10, 3), "sm_90a sm_100f", True),
        ((9, 0), "sm_80 sm_90a", True),
        ((12, 1), "sm_75 sm_120a", False),
        ((9, 0), "gfx90a gfx942", True),  # an AMD GPU
    ],
)
def test_a_gpu_without_kernels_is_refused(monkeypatch, capability, built_for, is_supported):
    gpus(monkeypatch, capability, built_for.split())
    if is_supported:
        assert pick_device().type == "cuda"
        return
    message = rf"no kernels for the Tesla V100 \(compute capability {capability[0]}\.{capability[1]}\), but for sm_75, "
    with pytest.raises(UserError, match=message):
        pick_device()
