"""How samples are compared: distance, precision, recall, the classifier, and which images are compared with which."""

import hashlib
import os

import pytest
import torch

from lab import config as configs
from lab import metrics
from lab.cli import UserError
from lab.metrics import Comparison, extract_features, frechet_distance, precision_recall, predict, real_images

CPU = torch.device("cpu")


def features(mean: list[float], deviations: list[float], count: int, seed: int) -> torch.Tensor:
    """Features (count, F) whose sample mean and covariance are exactly `mean` and diag(deviations^2)."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white * torch.tensor(deviations) + torch.tensor(mean)


@pytest.mark.parametrize("axes", [torch.eye(3), torch.tensor([[1, 0.3, 0], [0, 1, -2], [0.5, 0, 1]])], ids=["same", "any"])
def test_the_distance_of_normal_distributions(axes):
    """|difference of the means|^2 + tr(A + B - 2 (A B)^(1/2)) of the covariances A and B.

    With the same axes the second part is the sum of the squared differences of the standard deviations.
    """
    real, fake = features([0, 0, 3], [1, 2, 0.5], 300, 0), features([1, 0, 5], [1, 0.5, 1.5], 200, 1) @ axes.double()
    A, B = real.T.cov(), fake.T.cov()
    root = torch.linalg.eigvals(A @ B).real.sqrt().sum()
    expected = (real.mean(dim=0) - fake.mean(dim=0)).square().sum() + A.trace() + B.trace() - 2 * root
    assert frechet_distance(real, fake) == pytest.approx(expected.item(), rel=1e-4)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
    if torch.equal(axes, torch.eye(3)):
        assert expected == pytest.approx(1 + 4 + 1.5**2 + 1)


def test_precision_and_recall_of_points_on_a_line():
    line = torch.arange(8.0)[:, None]  # of each point, the nearest two neighbours are at most 2 away
    assert precision_recall(line, line, 2) == (1, 1)
    assert precision_recall(line, line + 100, 2) == (0, 0)
    assert precision_recall(line, line[:4] + 0.25, 2) == (1, 6 / 8)  # 0 to 5 are within 1 or 2 of 0.25, 1.25, 2.25, 3.25
    assert precision_recall(line, torch.full((6, 1), 3.0), 2) == (1, 1 / 8)  # copies, whose neighbours are at a distance of 0


def test_images_are_ranked_as_they_should_be(tmp_path):
    """Real images are at the floor; noise makes them less precise, copies and missing classes lower the recall, and images that
    no data set holds are far from everything. The classifier learns one half of the digits; the other half is the reference."""
    sections = {"data": {"dataset": "digits", "resolution": 8}, "network": {"channel_mult": [1], "attn_resolutions": []}}
    config = configs.from_dict(sections, "digits", "here")
    digits = Comparison(config, *real_images(config), CPU, tmp_path)
    count, generator = 600, torch.Generator().manual_seed(0)
    real, labels = digits.real_samples(count)
    floor = digits.floor(count)
    noisy = digits.quality((real + 60 * torch.randn(real.shape, generator=generator)).clamp(0, 255).byte(), labels)
    copied = digits.quality(real[:20].repeat(count // 20, 1, 1, 1), labels[:20].repeat(count // 20))
    few_classes = digits.quality(real[labels < 5], labels[labels < 5])
    random = digits.quality(torch.randint(0, 256, real.shape, generator=generator).byte(), labels)
    assert noisy["frechet_distance"] > 1.5 * floor["frechet_distance"]
    assert min(copied["frechet_distance"], few_classes["frechet_distance"]) > 10 * floor["frechet_distance"]
    assert random["frechet_distance"] > 1.5 * copied["frechet_distance"]
    assert min(floor["precision"], floor["recall"], copied["precision"]) > 0.75
    assert noisy["precision"] < 0.7 * floor["precision"]
    assert max(copied["recall"], random["precision"], floor["class_distance"]) < 0.1
    assert few_classes["recall"] < 0.7 * floor["recall"]
    assert few_classes["class_distance"] == pytest.approx(0.5, abs=0.05)
    assert floor["right_class"] > 0.9
    assert random["right_class"] < 0.2
    assert (predict(digits.classifier, digits.reference.images) == digits.reference.labels).double().mean() > 0.9


@pytest.mark.parametrize("against", ["test", "train"])
def test_which_images_are_compared(tmp_path, monkeypatch, mnist_folder, against):
    """The test images by default, beside the training images, which the classifier has learned; or the other way round."""
    monkeypatch.setattr(metrics, "MIN_STEPS", 5)
    learned, learn = [], metrics.train_classifier
    monkeypatch.setattr(metrics, "train_classifier", lambda data, *args: (learned.append(data), learn(data, *args))[1])
    config = configs.load(configs.CONFIGS / "edm.yaml", [f"data.root={mnist_folder}", "data.channels=3"])
    train, test = real_images(config)
    assert [part.images[0].max() for part in (train, test)] == [0, 190]
    test = metrics.LabelledImages(255 - test.images, test.labels)  # so that they differ from the training images
    comparison = Comparison(config, train, test, CPU, tmp_path, against)
    reference, others = (test, train) if against == "test" else (train, test)
    features = extract_features(comparison.net, reference.images)
    places = [(features == row).all(dim=1).nonzero()[0].item() for row in comparison.reference_features]
    assert sorted(places) == list(range(20)) != places
    shown = comparison.real_samples(20)
    orders = [images.flatten(1).double().mean(dim=1).argsort() for images in (shown.images, others.images)]
    assert all(torch.equal(one[orders[0]], other[orders[1]]) for one, other in zip(shown, others))
    assert not torch.equal(*orders)
    assert comparison.floor(7)["images"] == 7
    assert comparison.floor(70)["images"] == 20
    balanced = comparison.real_samples(2 * comparison.num_classes, balanced=True)
    assert balanced.labels.bincount().tolist() == [2] * comparison.num_classes
    halves = map(comparison.frechet_distance, balanced.images.split(comparison.num_classes))
    assert comparison.mean_floor(comparison.num_classes, 2, balanced=True) == pytest.approx(sum(halves) / 2)
    sets = [comparison.frechet_distance(part) for part in shown.images.split(6)[:3]]  # of 20 images, 3 sets of 6
    assert comparison.mean_floor(6, 3, balanced=False) == comparison.mean_floor(6, 8, balanced=False)
    assert comparison.mean_floor(6, 3, balanced=False) == pytest.approx(sum(sets) / 3)
    Comparison(config, train, test, CPU, tmp_path)
    assert len(learned) == 1  # it is read from its file
    assert learned[0] is train
    Comparison(config, metrics.LabelledImages(255 - train.images, train.labels), test, CPU, tmp_path)
    assert len(learned) == 2


def test_an_image_folder_is_divided(tmp_path, tiny, image_folder, monkeypatch):
    """Its halves have no image in common, and each set of images has a classifier of its own."""
    monkeypatch.setattr(metrics, "MIN_STEPS", 5)

    def compare() -> Comparison:
        config = configs.load(tiny)
        return Comparison(config, *real_images(config), CPU, tmp_path / "classifier")

    comparison = compare()
    assert (len(comparison.reference.images), len(comparison.others.images)) == (6, 7)
    assert len(torch.cat([comparison.reference.images, comparison.others.images]).unique(dim=0)) == 13
    assert comparison.reference.labels.unique().tolist() == [0, 1]  # files lie in the order of their classes; halves do not
    next(iter((image_folder / "dark").iterdir())).unlink()
    compare()
    assert len(list((tmp_path / "classifier").iterdir())) == 2
    for path in sorted(image_folder.glob("*/*.png"))[:6]:
        path.unlink()
    with pytest.raises(UserError, match="too few to compare samples with"):
        compare()


@pytest.mark.parametrize("code", [True, False])
def test_inceptions_file_is_read_if_it_has_the_published_checksum_and_no_code_in_it_runs(tmp_path, monkeypatch, code):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "inception_v3_google-0cc3c7bd.pth"
    path.parent.mkdir(parents=True)
    torch.save(Bomb(str(tmp_path / "bomb")) if code else {"weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match=rf"^{path} could not be .*or is damaged: .* \(its checksum is another one\)$"):
        metrics.Inception()
    # The same under a name that has its checksum.
    renamed = path.with_name(f"x-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    path.rename(renamed)
    if code:
        with pytest.raises(UserError, match="is damaged"):
            metrics.published_weights(f"https://x/{renamed.name}")
        assert not (tmp_path / "bomb").exists()
    else:
        assert metrics.published_weights(f"https://x/{renamed.name}")["weight"].tolist() == [1, 1, 1]


class Bomb:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_one_class_needs_inception(tmp_path, tiny, image_folder, monkeypatch):
    for path in image_folder.glob("light/*.png"):
        path.rename(image_folder / "dark" / path.name)
    config = configs.load(tiny)
    real = real_images(config)
    with pytest.raises(UserError, match="image_folder has one class, and a classifier needs two; use --features inception"):
        Comparison(config, *real, CPU, tmp_path)
    monkeypatch.setattr(metrics, "Inception", lambda: metrics.Classifier(3, 2).eval())
    comparison = Comparison(config, *real, CPU, tmp_path, features="inception")
    assert comparison.quality(comparison.reference.images).keys() == {"images", "frechet_distance", "precision", "recall"}
    assert list(tmp_path.glob("*.pt")) == []
