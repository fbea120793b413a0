"""The U-Nets of Appendix F: the authors' numbers, the initial weights, and what their parts do."""

import json
from pathlib import Path

import pytest
import torch

from edm import precond
from edm.precond import EDMPreconditioning, PreconditionedDenoiser
from edm.unet import ADM, NETWORKS, DDPMpp, NCSNpp

CASES = json.loads(Path(__file__).parents[1].joinpath("reference", "official_edm.json").read_text())["networks"]
SIZES = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout")  # all else is the architecture's


def reference_net(case: dict, fill) -> PreconditionedDenoiser:
    preconditioning = getattr(precond, f"{case['preconditioning']}itioning")()  # "VPPrecond": VPPreconditioning
    res, channels, label_dim, augment_dim = (case[k] for k in ("img_resolution", "img_channels", "label_dim", "augment_dim"))
    sizes = {key: case["options"][key] for key in SIZES}
    architecture = NETWORKS[case["architecture"]]
    model = architecture(res, channels, preconditioning.outputs * channels, label_dim, augment_dim, **sizes)
    return fill(PreconditionedDenoiser(model, preconditioning)).eval()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['architecture']}-{case['preconditioning']}")
@pytest.mark.parametrize(
    ("dtype", "memory_format", "tolerance"),
    [(torch.float64, torch.contiguous_format, 1e-9), (torch.float32, torch.channels_last, 1e-5)],
    ids=["float64", "float32"],
)
def test_network_agrees_with_the_authors(case, dtype, memory_format, tolerance, fill, wave, assert_close):
    if dtype == torch.float32 and case["num_parameters"] > 10**7:
        tolerance = 5e-5  # these weights magnify rounding: that of x alone moves D by 3e-4
    net = reference_net(case, fill).to(dtype=dtype, memory_format=memory_format)
    assert {name: list(p.shape) for name, p in net.named_parameters()} == case["parameters"]
    assert sum(p.numel() for p in net.parameters()) == case["num_parameters"]

    res, channels = case["img_resolution"], case["img_channels"]
    x = wave(2, channels, res, res, scale=0.5, frequency=0.7, phase=0.3)
    sigma = torch.tensor([0.05, 1.7], dtype=torch.float64)
    labels = torch.eye(10)[[3, 7]] if case["label_dim"] else None
    augment_labels = wave(2, case["augment_dim"], scale=0.3, frequency=1.1, phase=0.2) if case["augment_dim"] else None
    with torch.no_grad():
        denoised = net(x, sigma, labels, augment_labels)
    assert denoised.shape == x.shape
    assert denoised.dtype == dtype
    D, expected = denoised.double().flatten(), case["denoised"]
    probe = (D * wave(len(D), scale=1, frequency=0.37, phase=0.1)).mean()
    assert_close(D[:8], expected["first"], tolerance)
    moments = torch.stack([D.mean(), D.square().mean().sqrt(), probe])
    assert_close(moments, [expected[key] for key in ("mean", "rms", "probe")], tolerance)


def test_sigma_is_a_number_a_scalar_or_a_vector_and_images_do_not_mix(fill, wave, assert_close):
    """The contract of a denoiser. No label is the zero vector."""
    net = reference_net(CASES[1], fill)
    x = wave(3, 3, 16, 16, scale=1, frequency=0.4, phase=0)
    together = net(x, torch.full((3,), 0.7, dtype=torch.float64))
    assert_close(net(x, 0.7), together)
    assert_close(net(x, torch.tensor(0.7, dtype=torch.float64)), together)
    assert_close(torch.cat([net(image[None], 0.7) for image in x]), together)
    assert_close(net(x, 0.7, torch.zeros(3, 10)), together)
    assert (net(x, 0.7, torch.eye(10)[:3]) - together).abs().max() > 1e-3


@pytest.mark.parametrize("network", [DDPMpp, NCSNpp])
def test_a_new_network_is_almost_the_identity_times_c_skip_and_every_weight_can_learn(network):
    torch.manual_seed(0)
    model = network(16, 1, label_dim=3, augment_dim=9, model_channels=16, num_blocks=1, attn_resolutions=(8,))
    net = PreconditionedDenoiser(model, EDMPreconditioning())
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(net(x, 0.5), 0.5 * x, atol=1e-3, rtol=0)  # the last convolution starts at 1e-5
    net(x, 0.5, torch.eye(3)[:2], torch.ones(2, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_initial_weights_of_adm_are_uniform_within_the_root_of_the_fan_in():
    """But the labels' are normal, and those of the last layers are 0, so that a new network puts out 0."""
    torch.manual_seed(0)
    net = ADM(16, 1, label_dim=100, augment_dim=9, model_channels=32, channel_mult=(1, 4), num_blocks=1, attn_resolutions=(8,))
    zeros = {name for name, p in net.named_parameters() if "norm" not in name and p.abs().max() == 0}
    expected = ("conv1", "proj", "map_augment", "out_conv")
    assert zeros == {name for name, _ in net.named_parameters() if any(layer in name for layer in expected)}
    assert net.map_label.weight.std().item() == pytest.approx(1, abs=0.02)
    block = net.dec["8x8_in0"]
    for layer, fan_in in ((block.conv0, 128 * 9), (block.qkv, 128), (net.map_layer1, 128)):
        for parameter in layer.parameters():
            assert parameter.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.05)
            assert parameter.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.15)


def test_initial_weights_of_ddpmpp_and_ncsnpp():
    """Xavier's bound sqrt(6 / (fan_in + fan_out)) counts the kernel's pixels; Fourier frequencies have a deviation of 16."""
    torch.manual_seed(0)
    block = DDPMpp(16, 1, model_channels=32, channel_mult=(1, 4), num_blocks=1).dec["8x8_in0"]
    layers = {block.conv0: (256 * 9, 1), block.conv1: (256 * 9, 1e-5), block.qkv: (512, 0.2**0.5), block.affine: (256, 1)}
    for layer, (fans, gain) in layers.items():
        assert layer.weight.abs().max().item() == pytest.approx(gain * (6 / fans) ** 0.5, rel=0.01)
        assert layer.bias.abs().max() == 0
    embedding = NCSNpp(8, 1, model_channels=256, channel_mult=(1,), num_blocks=1).map_noise
    assert embedding.freqs.shape == (256,)
    assert embedding.freqs.std().item() == pytest.approx(16, rel=0.15)


def test_dropout_acts_in_training_only_and_autocast_reaches_neither_the_embedding_nor_the_skip_connection():
    torch.manual_seed(0)
    model = DDPMpp(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, dropout=0.5)
    net, x, seen = PreconditionedDenoiser(model, EDMPreconditioning()), torch.randn(1, 1, 8, 8) * 0.01, {}
    assert not torch.equal(net.train()(x, 80.0), net(x, 80.0))
    assert torch.equal(net.eval()(x, 80.0), net(x, 80.0))
    model.map_layer1.register_forward_hook(lambda module, args, out: seen.update(embedding=out.dtype))
    model.enc["8x8_block0"].conv0.register_forward_hook(lambda module, args, out: seen.update(conv=out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        D = net(x, 1e-4)
    assert seen == {"embedding": torch.float32, "conv": torch.bfloat16}
    torch.testing.assert_close(D, x, atol=1e-7, rtol=1e-6)  # bf16 alone would be off by 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_mult": (1, 1, 1, 1, 1, 1)}, "halved 5 times"),
        ({"model_channels": 48, "channel_mult": (1, 2)}, "144 channels"),
        ({"model_channels": 224, "channel_mult": (1,)}, "224 channels cannot be divided among 3 equal heads"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ADM(16, 1, **options)
