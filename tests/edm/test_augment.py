"""Augmentation (Appendix F.2, Table 6): exact where it can be, and the labels say what was done."""

import math

import pytest
import torch

from edm.augment import NUM_LABELS, Transformation, antialias, augment

IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def transformation(batch_size: int = 2, **fields: float | list[float]) -> Transformation:
    """Return the same for every image: nothing but what is named."""
    names = ("x_flip", "y_flip", "zoom", "angle", "stretch", "axis")
    values = {name: torch.full((batch_size,), float(fields.get(name, 0))) for name in names}
    return Transformation(**values, shift=torch.tensor([fields.get("shift", [0.0, 0.0])] * batch_size))


def blob(x: float, y: float, width_x: float = 2.5, width_y: float = 2.5, size: int = 33) -> torch.Tensor:
    """Return a Gaussian blob, its centre and widths in pixels relative to the image's centre: (1, 1, size, size) in [-1, 1]."""
    axis = torch.arange(size) - (size - 1) / 2
    return (2 * torch.exp(-((axis - x) ** 2) / (2 * width_x**2) - (axis[:, None] - y) ** 2 / (2 * width_y**2)) - 1)[None, None]


def test_probability_0_changes_nothing_not_even_the_generator():
    generator = torch.Generator().manual_seed(0)
    images, labels = augment(IMAGES, 0.0, generator)
    assert torch.equal(images, IMAGES) and labels.count_nonzero() == 0
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize(("fields", "dims"), [({}, []), ({"x_flip": 1}, [3]), ({"x_flip": 1, "y_flip": 1}, [2, 3])])
def test_flips_are_exact_and_so_is_an_image_to_which_nothing_happens(fields, dims):
    assert torch.equal(transformation(**fields).apply(IMAGES), IMAGES.flip(dims))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(12, 12), (11, 11), (9, 12)])
def test_whole_pixel_shifts_and_quarter_turns_are_exact(height, width, dtype, assert_close):
    """Borders are reflected, and turns are clockwise. Images have any shape and precision."""
    images = IMAGES[:, :, :height, :width].to(dtype)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    for right, down in ((1, 0), (0, -2), (3, 2), (-4, 1)):
        shifted = transformation(shift=[right / width * 8, down / height * 8]).apply(images)
        assert shifted.dtype == dtype
        assert_close(shifted, padded[:, :, 4 - down :, 4 - right :][:, :, :height, :width], 1e-5)
    for turns in (1, 2, 3, -1) if height == width else ():
        turned = transformation(angle=turns * math.pi / 2).apply(images)
        assert_close(turned, images.rot90(-turns, dims=[2, 3]), 1e-5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"shift": [0.5, -0.25]}, (4 + 0.5 * 33 / 8, -0.25 * 33 / 8, 2.5, 2.5)),
        ({"angle": math.pi / 4}, (8**0.5, 8**0.5, 2.5, 2.5)),
        ({"zoom": 3.0}, (4 * 2**0.6, 0, 2.5 * 2**0.6, 2.5 * 2**0.6)),
        ({"stretch": 3.0}, (4 * 2**0.6, 0, 2.5 * 2**0.6, 2.5 / 2**0.6)),
        ({"stretch": 3.0, "axis": math.pi / 2}, (4 / 2**0.6, 0, 2.5 / 2**0.6, 2.5 * 2**0.6)),
        ({"zoom": 2.0, "angle": math.pi / 2, "stretch": -1.0}, (0, 4 * 2**0.6, 2.5 * 2**0.2, 2.5 * 2**0.6)),
        ({"x_flip": 1, "angle": math.pi / 2, "shift": [0.0, 1.0]}, (0, -4 + 33 / 8, 2.5, 2.5)),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)
def test_a_blob_moves_and_grows_as_the_order_of_transformations_says(fields, expected):
    """Flip, zoom, turn, stretch, shift: a blob at (4, 0) ends where the composition puts it, to a few grey levels."""
    moved = transformation(1, **fields).apply(blob(4, 0))
    inner = (..., slice(6, -6), slice(6, -6))  # beyond it, the border's reflection shows the blob again
    torch.testing.assert_close(moved[inner], blob(*expected)[inner], atol=0.08, rtol=0)


def test_the_anti_aliasing_filter_is_a_gaussian_along_the_axis_that_shrinks():
    """Its variance is (m^2 - 1) / 4 where the inverse enlarges by m, so stripes of one pixel, of frequency pi, keep
    exp(-pi^2 (m^2 - 1) / 8) of their contrast; stripes across an axis that is not shrunk keep all of it. So what is finer than
    the grid becomes grey; point sampling would leave moire."""
    fine = (torch.arange(64) % 2 * 2 - 1).float().expand(1, 1, 64, 64)
    upright = {"stretch": 3.0}  # enlarges in x, shrinks in y
    for fields, stripes, w in (
        ({"zoom": -1.0}, fine, -1),
        ({"zoom": -2.5}, fine, -2.5),
        (upright, fine, 0),
        (upright, fine.mT, -3),
    ):
        contrast = math.exp(-(math.pi**2) * (4 ** (-0.2 * w) - 1) / 8)
        smooth = antialias(stripes, transformation(1, **fields).inverse_matrix())
        torch.testing.assert_close(smooth, contrast * stripes, atol=1e-5, rtol=0)
    assert transformation(1, zoom=-7.0).apply(fine)[..., 24:40, 24:40].abs().max() < 0.05


def test_labels_are_those_of_table_6(assert_close):
    labels = transformation(1, x_flip=1, y_flip=1, zoom=0.7, angle=0.4, stretch=-0.6, axis=0.9, shift=[1.1, -0.3]).labels()
    expected = [1, 1, 0.7, math.cos(0.4) - 1, math.sin(0.4), -0.6 * math.cos(0.9), -0.6 * math.sin(0.9), 1.1, -0.3]
    assert_close(labels, [expected], 1e-6)
    assert torch.equal(transformation(axis=1.0).labels(), torch.zeros(2, NUM_LABELS))  # an axis without a stretch is nothing


def test_draws_have_the_probabilities_and_distributions_of_table_6():
    drawn = Transformation.draw(200_000, 0.12, torch.Generator().manual_seed(0))
    right, down = drawn.shift.unbind(dim=1)
    assert drawn.x_flip.mean().item() == pytest.approx(0.5, abs=0.005)
    assert drawn.y_flip.mean().item() == pytest.approx(0.06, abs=0.003)
    normal, angle = [(field, 0.12, 1) for field in (drawn.zoom, drawn.stretch, right, down)], math.pi / 3**0.5
    for field, share, deviation in (*normal, (drawn.angle, 0.12, angle), (drawn.axis, 0.5, angle)):
        happened = field[field != 0]
        assert len(happened) / 200_000 == pytest.approx(share, abs=0.005)
        assert happened.mean().item() == pytest.approx(0, abs=0.04)
        assert happened.std().item() == pytest.approx(deviation, abs=0.04)
    assert max(drawn.angle.abs().max(), drawn.axis.abs().max()) <= math.pi
    assert torch.equal(right != 0, down != 0)
    happened = torch.stack([drawn.zoom != 0, drawn.stretch != 0, drawn.angle != 0, drawn.y_flip != 0]).float()
    assert (happened.corrcoef() - torch.eye(4)).abs().max() < 0.02  # each has a draw of its own


def test_a_part_of_a_batch_is_transformed_as_in_the_whole_batch(assert_close):
    """So images do not mix, and results do not depend on how a batch is divided. Colours stay in [-1, 1]."""
    noise = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)).round() * 2 - 1
    images, labels = augment(noise, 1.0, torch.Generator().manual_seed(2))
    part, part_labels = augment(noise[5:9], 1.0, torch.Generator().manual_seed(2), batch_size=64, shard=slice(5, 9))
    assert_close(part, images[5:9], 1e-5)
    assert torch.equal(part_labels, labels[5:9])
    assert images.abs().max() <= 1
    assert (images - noise).abs().mean(dim=(1, 2, 3)).min() > 0.1
    white = augment(torch.ones(64, 1, 16, 16), 1.0, torch.Generator().manual_seed(2))[0]
    assert_close(white, torch.ones(64, 1, 16, 16), 1e-6)
    assert augment(noise[..., :2, :2], 1.0, torch.Generator().manual_seed(2))[0].shape == (64, 3, 2, 2)  # no image is smaller


def test_resampling_is_differentiable():
    """Against finite differences; the images stay clear of the clamp to [-1, 1]."""
    images = 0.5 * IMAGES[:1, :1, :6, :6].double().requires_grad_()
    assert torch.autograd.gradcheck(transformation(1, angle=0.3, zoom=-1.0, stretch=1.0).apply, images)
