"""What samples are judged by: the classifier, the distance, precision and recall, and which images are compared with which."""

import pytest
import torch
from conftest import write_config
from test_training import CPU
from torch.utils.data import TensorDataset

from edm import config as configs
from edm.config import DataConfig
from edm.errors import UserError
from edm.judge import Judge
from edm.metrics import Classifier, features_of, frechet_distance, precision_recall, predictions, train_classifier


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Judge:
    """Of the embedded digits; the classifier learns one half, and the other half stands for the data."""
    config = configs.from_dict({"data": {"dataset": "digits", "resolution": 16}}, "digits", "here")
    return Judge(config, CPU, tmp_path_factory.mktemp("judge"))


def test_the_classifier_learns_the_digits(digits):
    assert (predictions(digits.classifier, digits.real) == digits.labels).double().mean() > 0.9


def test_images_are_ranked_as_they_should_be(digits):
    """Real images are at the floor; noise makes them less precise, copies and missing classes lower the recall, and images that
    no data set holds are far from everything."""
    count = 600
    floor = digits.floor(count)
    real, labels = digits.others[:count], digits.other_labels[:count]
    generator = torch.Generator().manual_seed(0)
    noisy = (real + 60 * torch.randn(real.shape, generator=generator)).clamp(0, 255).byte()
    found = {
        "noisy": digits.quality(noisy, labels),
        "copied": digits.quality(real[:20].repeat(count // 20, 1, 1, 1), labels[:20].repeat(count // 20)),
        "few classes": digits.quality(real[labels < 5], labels[labels < 5]),
        "random": digits.quality(torch.randint(0, 256, real.shape, generator=generator).byte(), labels),
    }
    distances = {name: quality["frechet_distance"] / floor["frechet_distance"] for name, quality in found.items()}
    assert distances["noisy"] > 1.5
    assert min(distances["copied"], distances["few classes"]) > 10
    assert distances["random"] > 1.5 * distances["copied"]
    assert floor["precision"] > 0.75
    assert floor["recall"] > 0.75
    assert found["noisy"]["precision"] < 0.7 * floor["precision"]
    assert found["copied"]["precision"] > 0.8
    assert found["copied"]["recall"] < 0.1
    assert found["few classes"]["recall"] < 0.7 * floor["recall"]
    assert found["random"]["precision"] < 0.05
    assert found["random"]["recall"] < 0.5 * floor["recall"]
    assert floor["class_distance"] < 0.1
    assert found["few classes"]["class_distance"] == pytest.approx(0.5, abs=0.05)
    assert floor["right_class"] > 0.9
    assert found["random"]["right_class"] < 0.2


def test_precision_and_recall_by_their_definition():
    """By loops over 40 and 30 points in the plane."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(40, 2, generator=generator), 0.7 + torch.randn(30, 2, generator=generator)

    def share(points, others, k):
        radii = [sorted((other - another).norm().item() for another in others)[k] for other in others]
        return sum(any((point - other).norm() <= r for other, r in zip(others, radii)) for point in points) / len(points)

    for k in (1, 3):
        assert precision_recall(real, fake, k) == pytest.approx((share(fake, real, k), share(real, fake, k)))


def test_the_distance_is_frechets():
    """Of all images: |difference of the means|^2 + tr(A + B - 2 (A B)^(1/2)) of the features."""
    net = Classifier(1, 2).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, high, (number, 1, 8, 8), generator=generator).byte() for high, number in ((256, 1200), (100, 700))]
    means, covariances = zip(*((f.mean(dim=0), f.T.cov()) for f in (net(images).double() for images in sets)))
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * root
    assert frechet_distance(*(features_of(net, images) for images in sets)) == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(("against", "real", "others"), [("test", 200, 10), ("train", 10, 200)])
def test_which_images_are_compared(tmp_path, monkeypatch, against, real, others):
    """The test images by default, beside the training images, which the classifier has learned; or the other way round."""
    monkeypatch.setattr("edm.metrics.MIN_STEPS", 5)

    def split(dataset, root, resolution, channels, label_dim, test=False):
        images = torch.full((20, channels, 8, 8), 200 if test else 10, dtype=torch.uint8)
        images += torch.arange(20, dtype=torch.uint8)[:, None, None, None]
        return TensorDataset(images, torch.arange(20) % 2)

    learned = []
    monkeypatch.setattr("edm.judge.open_dataset", split)
    monkeypatch.setattr("edm.judge.train_classifier", lambda *args: (learned.append(args[0]), train_classifier(*args))[1])
    judge = Judge(configs.Config(data=DataConfig(dataset="mnist")), CPU, tmp_path, against)
    assert learned[0].min() == 10
    assert judge.real.min() == real
    assert judge.others.min() == others
    assert torch.equal(judge.labels, (judge.real[:, 0, 0, 0] - real) % 2)
    assert torch.equal(judge.other_labels, (judge.others[:, 0, 0, 0] - others) % 2)
    assert judge.floor(7)["images"] == 7
    assert judge.floor(70)["images"] == 20
    Judge(configs.Config(data=DataConfig(dataset="mnist")), CPU, tmp_path, against)
    assert len(learned) == 1


def test_an_image_folder_is_divided(tmp_path, image_folder, monkeypatch):
    """Its halves have no image in common, and each set of images has a classifier of its own."""
    monkeypatch.setattr("edm.metrics.MIN_STEPS", 5)
    judge = Judge(configs.load(write_config(tmp_path, image_folder, channels=3)), CPU, tmp_path / "j")
    assert (len(judge.real), len(judge.others)) == (6, 7)
    assert len(torch.cat([judge.real, judge.others]).unique(dim=0)) == 13
    assert judge.labels.unique().tolist() == [0, 1]  # files lie in the order of their classes, and the halves do not
    next(iter((image_folder / "dark").iterdir())).unlink()
    Judge(configs.load(tmp_path / "tiny.yaml"), CPU, tmp_path / "j")
    assert len(list((tmp_path / "j/classifier").iterdir())) == 2
    for path in sorted(image_folder.glob("*/*.png"))[:6]:
        path.unlink()
    with pytest.raises(UserError, match="too few images to compare"):
        Judge(configs.load(tmp_path / "tiny.yaml"), CPU, tmp_path / "j")


def test_inception_is_asked_for(tmp_path, image_folder, monkeypatch):
    """Its 2048 features of grey and colour alike, from weights that are read or downloaded; a download that fails is a line."""
    import torchvision

    def made(weights):
        torch.manual_seed(0)
        net = torchvision.models.Inception3(num_classes=1000, transform_input=True, init_weights=False)
        monkeypatch.setattr(net, "state", "made here", raising=False)
        return net

    monkeypatch.setattr("torchvision.models.inception_v3", lambda weights: made(weights))
    for path in image_folder.glob("light/*.png"):  # one class, which has no classifier
        path.rename(image_folder / "dark" / path.name)
    config = configs.load(write_config(tmp_path, image_folder, channels=1))
    judge = Judge(config, CPU, tmp_path / "j", features="inception")
    assert judge.real_features.shape == (6, 2048)
    assert judge.classifier is None
    assert judge.quality(judge.real).keys() == {"images", "frechet_distance", "precision", "recall"}
    assert torch.equal(features_of(judge.net, judge.real), features_of(judge.net, judge.real.expand(-1, 3, -1, -1)))

    def offline(weights):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models.inception_v3", offline)
    with pytest.raises(UserError, match=r"Inception could not be downloaded or read \(no route to host\)"):
        Judge(config, CPU, tmp_path / "j", features="inception")
