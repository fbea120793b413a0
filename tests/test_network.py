"""The network and its preconditioning: the authors' numbers, and what the paper derives them from."""

import pytest
import torch
from reference import OFFICIAL, assert_close, fill, wave

from edm.precond import Denoiser, EDMPreconditioning
from edm.unet import DDPMpp

NETWORKS = [n for n in OFFICIAL["networks"] if (n["architecture"], n["preconditioning"]) == ("ddpmpp", "EDMPrecond")]


def reference_net(case: dict) -> Denoiser:
    sizes = (case[key] for key in ("img_resolution", "img_channels", "label_dim", "augment_dim"))
    return fill(Denoiser(DDPMpp(*sizes, **case["options"]), EDMPreconditioning())).eval()


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_network_agrees_with_the_authors(case, dtype, tolerance, memory_format):
    net = reference_net(case).to(dtype=dtype, memory_format=memory_format)
    assert {name: list(p.shape) for name, p in net.named_parameters()} == case["parameters"]
    assert sum(p.numel() for p in net.parameters()) == case["num_parameters"]

    res, channels = case["img_resolution"], case["img_channels"]
    x = wave(2, channels, res, res, scale=0.5, frequency=0.7, phase=0.3)
    sigma = torch.tensor([0.05, 1.7], dtype=torch.float64)
    labels = torch.eye(10)[[3, 7]] if case["label_dim"] else None
    augment_labels = wave(2, case["augment_dim"], scale=0.3, frequency=1.1, phase=0.2) if case["augment_dim"] else None
    denoised = net(x, sigma, labels, augment_labels)
    assert denoised.dtype == dtype
    D = denoised.double().flatten()
    probe = (D * wave(len(D), scale=1, frequency=0.37, phase=0.1)).mean()
    expected = case["denoised"]
    assert_close(D[:8], expected["first"], tolerance)
    assert_close(
        torch.stack([D.mean(), D.square().mean().sqrt(), probe]), [expected[k] for k in ("mean", "rms", "probe")], tolerance
    )


def test_denoiser_takes_sigma_as_number_scalar_or_vector_and_images_do_not_mix():
    net = reference_net(NETWORKS[1])
    x = wave(3, 3, 16, 16, scale=1, frequency=0.4, phase=0)
    together = net(x, torch.full((3,), 0.7, dtype=torch.float64))
    assert_close(net(x, 0.7), together.tolist())
    assert_close(net(x, torch.tensor(0.7, dtype=torch.float64)), together.tolist())
    assert_close(torch.cat([net(image[None], 0.7) for image in x]), together.tolist())
    assert_close(net(x, 0.7, torch.zeros(3, 10)), together.tolist())  # no label is the zero vector
    assert (net(x, 0.7, torch.eye(10)[:3]) - together).abs().max() > 1e-3


def test_new_network_is_almost_the_identity_times_c_skip_and_every_weight_can_learn():
    torch.manual_seed(0)
    net = Denoiser(DDPMpp(16, 1, label_dim=3, model_channels=16, num_blocks=1, attn_resolutions=(8,)), EDMPreconditioning())
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(net(x, 0.5), 0.5 * x, atol=1e-3, rtol=0)  # the last convolution starts at 1e-5
    net(x, 0.5, torch.eye(3)[:2]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    net = fill(Denoiser(DDPMpp(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, dropout=0.5), EDMPreconditioning()))
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(net.train()(x, 1.0), net(x, 1.0))
    assert torch.equal(net.eval()(x, 1.0), net(x, 1.0))


def test_autocast_reaches_neither_the_embedding_nor_the_skip_connection():
    torch.manual_seed(0)
    net = Denoiser(DDPMpp(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1), EDMPreconditioning()).eval()
    x = torch.randn(1, 1, 8, 8) * 0.01
    seen = {}
    net.model.map_layer1.register_forward_hook(lambda module, args, out: seen.update(embedding=out.dtype))
    net.model.enc["8x8_block0"].conv0.register_forward_hook(lambda module, args, out: seen.update(conv=out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        D = net(x, 1e-4)
    assert seen == {"embedding": torch.float32, "conv": torch.bfloat16}
    torch.testing.assert_close(D, x, atol=1e-7, rtol=1e-6)  # bf16 alone would be off by 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_mult": (1, 1, 1, 1, 1, 1)}, "halved 5 times"),
        ({"model_channels": 48, "channel_mult": (1, 2)}, "144 channels"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DDPMpp(16, 1, **options)


def test_preconditioning_agrees_with_the_authors():
    p = EDMPreconditioning()
    for row in OFFICIAL["preconditioning"]["EDMPrecond"]:
        sigma = torch.tensor(row["sigma"], dtype=torch.float64)
        assert_close(
            torch.stack([p.c_skip(sigma), p.c_out(sigma), p.c_in(sigma), p.c_noise(sigma)]),
            [row[key] for key in ("c_skip", "c_out", "c_in", "c_noise")],
        )


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.0, 80.0])
def test_input_and_target_of_the_network_have_unit_variance(sigma, sigma_data):
    """Appendix B.6, by Monte Carlo: 10^6 draws, whose variance is known to 0.15% (a standard deviation)."""
    p, sigma = EDMPreconditioning(sigma_data), torch.tensor(sigma, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    y = sigma_data * torch.randn(10**6, generator=generator, dtype=torch.float64)
    n = sigma * torch.randn(10**6, generator=generator, dtype=torch.float64)
    target = (y - p.c_skip(sigma) * (y + n)) / p.c_out(sigma)
    assert (p.c_in(sigma) * (y + n)).var().item() == pytest.approx(1, abs=0.01)
    assert target.var().item() == pytest.approx(1, abs=0.01)
    # Appendix B.6: no other c_skip leaves less for the network to get wrong.
    less, best, more = ((y - (p.c_skip(sigma) + change * p.c_in(sigma)) * (y + n)).var() for change in (-0.05, 0, 0.05))
    assert best < less
    assert best < more
