"""Augmentation (Appendix F.2, Table 6): exact where it can be, and the labels say what was done."""

import math

import pytest
import torch
from reference import assert_close

from edm.augment import NUM_LABELS, Transformation, antialiased, augment

IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def transformation(batch_size: int = 2, **fields: float | list[float]) -> Transformation:
    """The same for every image: nothing but what is named."""
    names = ("x_flip", "y_flip", "zoom", "angle", "stretch", "axis")
    values = {name: torch.full((batch_size,), float(fields.get(name, 0))) for name in names}
    return Transformation(**values, shift=torch.tensor([fields.get("shift", [0.0, 0.0])] * batch_size))


def blob(x: float, y: float, width_x: float = 2.5, width_y: float = 2.5, size: int = 33) -> torch.Tensor:
    """A Gaussian blob, its centre and widths in pixels relative to the image's centre: (1, 1, size, size) in [-1, 1]."""
    axis = torch.arange(size) - (size - 1) / 2
    return (2 * torch.exp(-((axis - x) ** 2) / (2 * width_x**2) - (axis[:, None] - y) ** 2 / (2 * width_y**2)) - 1)[None, None]


def test_probability_0_changes_nothing_not_even_the_generator():
    generator = torch.Generator().manual_seed(0)
    images, labels = augment(IMAGES, 0.0, generator)
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, torch.zeros(2, NUM_LABELS))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_an_image_that_nothing_happens_to_is_exact_and_has_labels_0():
    assert torch.equal(transformation().apply(IMAGES), IMAGES)
    assert torch.equal(transformation(axis=1.0).labels(), torch.zeros(2, NUM_LABELS))


@pytest.mark.parametrize(("fields", "dims"), [({"x_flip": 1}, [3]), ({"y_flip": 1}, [2]), ({"x_flip": 1, "y_flip": 1}, [2, 3])])
def test_flips_are_exact(fields, dims):
    assert torch.equal(transformation(**fields).apply(IMAGES), IMAGES.flip(dims))


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, -2), (3, 2), (-4, 1)])
def test_whole_pixel_shifts_are_exact_with_reflected_borders(right, down):
    shifted = transformation(shift=[right / 12 * 8, down / 12 * 8]).apply(IMAGES)
    padded = torch.nn.functional.pad(IMAGES, (4, 4, 4, 4), mode="reflect")
    assert_close(shifted, padded[:, :, 4 - down : 16 - down, 4 - right : 16 - right].tolist(), 1e-5)


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
@pytest.mark.parametrize("size", [12, 13])
def test_quarter_turns_are_exact_and_clockwise(turns, size):
    images = IMAGES if size == 12 else torch.rand(2, 1, 13, 13) * 2 - 1
    turned = transformation(angle=turns * math.pi / 2).apply(images)
    assert_close(turned, images.rot90(-turns, dims=[2, 3]).tolist(), 1e-5)


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
)
def test_a_blob_moves_and_grows_as_the_order_of_transformations_says(fields, expected):
    """Flip, zoom, turn, stretch, shift: a blob at (4, 0) ends where the composition puts it, to a few grey levels."""
    moved = transformation(1, **fields).apply(blob(4, 0))
    inner = (..., slice(6, -6), slice(6, -6))  # beyond it, the border's reflection shows the blob again
    torch.testing.assert_close(moved[inner], blob(*expected)[inner], atol=0.08, rtol=0)


def test_shrinking_is_anti_aliased_and_enlarging_leaves_no_blur():
    """Stripes of two pixels, shrunk below what the grid can hold, become grey; point sampling would leave moire."""
    stripes = (torch.arange(64) // 2 % 2 * 2 - 1).float().expand(1, 1, 64, 64)
    shrunk = transformation(1, zoom=-7.0).apply(stripes)[..., 24:40, 24:40]
    assert shrunk.abs().max() < 0.3
    for zoom, least, most in ((-1.0, 0.5, 0.8), (-2.5, 0.1, 0.35)):  # stripes of one pixel: exp(-pi^2 (4^(-0.2 w) - 1) / 8)
        fine = (torch.arange(64) % 2 * 2 - 1).float().expand(1, 1, 64, 64)
        smooth = antialiased(fine, transformation(1, zoom=zoom).backward_map())
        assert least < smooth[..., 24:40, 24:40].abs().max() < most
    upright = transformation(1, stretch=3.0).backward_map()  # enlarges in x, shrinks in y
    torch.testing.assert_close(antialiased(fine, upright), fine, atol=1e-5, rtol=0)
    assert antialiased(fine.mT, upright)[..., 24:40, 24:40].abs().max() < 0.3
    enlarged = transformation(1, zoom=5.0).apply(stripes)[..., 8:-8, 8:-8]
    assert enlarged.abs().mean() > 0.75


def test_labels_are_those_of_table_6():
    labels = transformation(1, x_flip=1, y_flip=1, zoom=0.7, angle=0.4, stretch=-0.6, axis=0.9, shift=[1.1, -0.3]).labels()
    expected = [1, 1, 0.7, math.cos(0.4) - 1, math.sin(0.4), -0.6 * math.cos(0.9), -0.6 * math.sin(0.9), 1.1, -0.3]
    assert_close(labels, [expected], 1e-6)


def test_draws_have_the_probabilities_and_distributions_of_table_6():
    drawn = Transformation.draw(200_000, 0.12, torch.Generator().manual_seed(0))
    assert drawn.x_flip.mean().item() == pytest.approx(0.5, abs=0.005)
    assert drawn.y_flip.mean().item() == pytest.approx(0.06, abs=0.003)
    for field in (drawn.zoom, drawn.stretch, drawn.shift[:, 0], drawn.shift[:, 1], drawn.angle):
        assert (field != 0).float().mean().item() == pytest.approx(0.12, abs=0.005)
    for field in (drawn.zoom, drawn.stretch, drawn.shift[:, 0], drawn.shift[:, 1]):
        happened = field[field != 0]
        assert happened.mean().item() == pytest.approx(0, abs=0.03)
        assert happened.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drawn.shift[:, 0] != 0, drawn.shift[:, 1] != 0)
    for angle, share in ((drawn.angle, 0.12), (drawn.axis, 0.5)):
        happened = angle[angle != 0]
        assert len(happened) / 200_000 == pytest.approx(share, abs=0.005)
        assert happened.abs().max() <= math.pi
        assert happened.std().item() == pytest.approx(math.pi / 3**0.5, abs=0.04)
    happened = torch.stack([drawn.zoom != 0, drawn.stretch != 0, drawn.angle != 0, drawn.y_flip != 0]).float()
    assert (happened.corrcoef() - torch.eye(4)).abs().max() < 0.02  # each on its own draw


def test_colours_stay_in_range_and_images_do_not_mix():
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(64, 3, 16, 16, generator=generator).round() * 2 - 1
    drawn = Transformation.draw(64, 1.0, generator)
    images = drawn.apply(noise)
    assert images.abs().max() <= 1
    one = Transformation(**{name: getattr(drawn, name)[5:6] for name in Transformation.__dataclass_fields__})
    assert_close(one.apply(noise[5:6]), images[5:6].tolist(), 1e-5)
    assert_close(drawn.apply(torch.ones(64, 1, 16, 16)), torch.ones(64, 1, 16, 16).tolist(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_any_shape_and_precision(dtype):
    images = torch.rand(1, 2, 5, 9, dtype=dtype, generator=torch.Generator().manual_seed(0))
    shifted = transformation(1, shift=[8 / 9, 8 / 5]).apply(images)
    assert shifted.dtype == dtype
    assert_close(shifted[:, :, 1:, 1:], images[:, :, :-1, :-1].tolist(), 1e-5)
    assert transformation(1, angle=1.0).apply(images[:, :, :2, :2]).shape == (1, 2, 2, 2)


def test_resampling_is_differentiable():
    images = IMAGES.clone().requires_grad_()
    transformation(angle=0.3, zoom=-1.0, stretch=1.0).apply(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert images.grad.isfinite().all()
