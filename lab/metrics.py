"""Frechet distance, precision, recall and classes of samples, by the features of a small classifier or of Inception."""

import hashlib
import io
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, one_hot
from tqdm import tqdm

from lab import checkpoint
from lab.cli import UserError, one_line
from lab.config import Config
from lab.data import HAVE_TEST_SETS, as_tensors, open_dataset
from lab.device import in_parts_that_fit
from lab.pictures import check_writable
from lab.seeds import generator_for, seed_for

MIN_STEPS = 200  # of training a classifier, however few the images are
NUM_NEIGHBOURS = 3  # precision and recall compare distances to the third nearest neighbour
MIN_IMAGES = NUM_NEIGHBOURS + 1


class LabelledImages(NamedTuple):
    """Images and their classes, on the CPU."""

    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,)


class Classifier(nn.Module):
    """Three convolutions and a linear layer, which give 64 features, and a linear layer for the scores of the classes.

    Args:
        channels: of the images, uint8 (B, channels, H, W) of 8 pixels or more.
        num_classes: at least 2; the features of a classifier of one class would mean nothing.
    """

    num_features = 64

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        layers = []
        for inputs, outputs in ((channels, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(inputs, outputs, 5, stride=2, padding=2), nn.GroupNorm(8, outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, self.num_features))
        self.scores = nn.Sequential(nn.ReLU(), nn.Linear(self.num_features, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features (B, 64) of images (B, C, H, W) uint8."""
        return self.features(images.float() / 127.5 - 1)


def train_classifier(
    train: LabelledImages, num_classes: int, device: torch.device, epochs: int = 3, batch_size: int = 128
) -> Classifier:
    """Return a classifier trained with Adam for some epochs, on the device."""
    images, labels = train
    torch.manual_seed(seed_for("classifier"))
    net = Classifier(images.shape[1], num_classes).to(device)
    steps = max(epochs * len(images) // batch_size, MIN_STEPS)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", unit="step", leave=False):
        index = torch.randint(len(images), (batch_size,), generator=generator_for("classifier", step))
        loss = cross_entropy(net.scores(net(images[index].to(device))), labels[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def load_or_train_classifier(
    config: Config, train: LabelledImages, num_classes: int, device: torch.device, folder: Path
) -> tuple[Classifier, Path]:
    """Return a classifier of `train`, on the device, and its file in `folder`.

    The file's name holds a digest of the images and labels; a classifier that was trained on the same ones is loaded.
    """
    digest = hashlib.blake2b(digest_size=6)
    for part in (*train.images.split(1000), train.labels):
        digest.update(part.contiguous().numpy())
    name = f"{config.data.dataset}-{digest.hexdigest()}"
    path = folder / f"{name}.pt"
    if path.exists():
        net = Classifier(config.data.channels, num_classes).to(device).eval().requires_grad_(False)
        checkpoint.load_weights(net, checkpoint.load(path)["ema"], path)
    else:
        check_writable(path)
        net = train_classifier(train, num_classes, device)
        checkpoint.save(path, {"step": 0, "name": name, "config": config.to_dict(), "ema": net.state_dict()})
    return net, path


def predict(net: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Return the most likely class of each image, (N,), on the CPU."""
    return net.scores(extract_features(net, images)).argmax(dim=1).cpu()


class Inception(nn.Module):
    """The 2048 features of torchvision's Inception v3, trained on ImageNet and downloaded on first use.

    Published FIDs use other weights, so distances in these features cannot be compared with them.

    Raises:
        UserError: the weights cannot be downloaded or read.
    """

    num_features = 2048

    def __init__(self):
        super().__init__()
        from torchvision.models import Inception_V3_Weights, inception_v3  # slow to import

        self.net = inception_v3(init_weights=False)
        self.net.load_state_dict(published_weights(Inception_V3_Weights.IMAGENET1K_V1.url))
        self.net.fc = nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features (B, 2048) of images (B, 1 or 3, H, W) uint8."""
        images = images.expand(-1, 3, -1, -1).float()
        return self.net(interpolate(images, size=(299, 299), mode="bilinear", antialias=True) / 127.5 - 1)


def published_weights(url: str) -> dict:
    """Return weights that PyTorch publishes, downloaded on first use. The file's name ends in the start of its SHA-256.

    Raises:
        UserError: they cannot be downloaded, or the file is not the published one.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        contents = path.read_bytes()
        if not path.stem.endswith(hashlib.sha256(contents).hexdigest()[:8]):
            raise ValueError("its checksum is another one")
        return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # a failed download and a damaged file raise anything
        reason = one_line(str(error))
        raise UserError(f"{path} could not be downloaded, or is damaged: delete it to try again ({reason:.100})") from None


@torch.no_grad()
def extract_features(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the features (N, F) of images (N, C, H, W) uint8, on the network's device; the images are moved there in parts."""
    device, features = next(net.parameters()).device, []
    for batch in tqdm(images.split(100), desc="features", leave=False):
        features += in_parts_that_fit(lambda part: net(part.to(device)), batch)
    return torch.cat(features)


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Return the Frechet distance between the normal distributions that fit two sets of features.

    Args:
        real, fake: (N, F) and (M, F), N and M at least 2.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import

    identity = nn.Identity()  # the metric gets features, not images
    identity.num_features = real.shape[1]
    metric = FrechetInceptionDistance(identity, sync_on_compute=False)  # only one process computes it
    metric.update(real.cpu(), real=True)  # on the CPU, as the metric needs float64, which Apple GPUs lack
    metric.update(fake.cpu(), real=False)
    return metric.compute().item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = NUM_NEIGHBOURS) -> tuple[float, float]:
    """Return precision, the share of samples that lie among the real images, and recall, the share of real images that lie
    among the samples (Kynkaanniemi et al., 2019, arXiv 1904.06991).

    A point lies among others if its distance to one of them is at most that one's distance to its k-th nearest neighbour.

    Args:
        real, fake: features, (N, F) and (M, F), N and M above k.
    """

    def distances(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        # By default cdist subtracts large numbers, which leaves copies at a distance above 0.
        return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")

    def share_among(points: torch.Tensor, others: torch.Tensor) -> float:
        # The nearest of `others` to each of them is itself, so the k-th neighbour is at index k.
        radii = torch.cat([distances(part, others).topk(k + 1, largest=False).values[:, k] for part in others.split(1000)])
        among = torch.cat([(distances(part, others) <= radii).any(dim=1) for part in points.split(1000)])
        return among.double().mean().item()

    return share_among(fake, real), share_among(real, fake)


def real_images(config: Config) -> tuple[LabelledImages, LabelledImages]:
    """Return the training images of the config's data set and the images held out.

    Of a data set without test images, a random half is held out. (The network may have been trained on it all the same.)

    Raises:
        UserError: the data cannot be found, downloaded or read.
    """
    images, labels = as_tensors(open_dataset(config))
    if config.data.dataset in HAVE_TEST_SETS:
        return LabelledImages(images, labels), LabelledImages(*as_tensors(open_dataset(config, test=True)))
    order, half = random_order(len(images)), len(images) // 2
    train, held_out = (LabelledImages(images[places], labels[places]) for places in (order[half:], order[:half]))
    return train, held_out


def random_order(count: int) -> torch.Tensor:
    """Return 0, 1, ..., count - 1 in random order, which is the same in every call."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


class Comparison:
    """Holds real images, the reference, and compares samples with them.

    Args:
        config: of the network that makes the samples.
        train, held_out: as returned by `real_images`.
        device: where the classifier, or Inception, and the features live.
        folder: of the classifier, which is trained on `train` on first use.
        against: "test" makes the images held out the reference, "train" the training images.
        features: "classifier" or "inception".

    Raises:
        UserError: too few images; a single class, which no classifier can be trained on; Inception cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        train: LabelledImages,
        held_out: LabelledImages,
        device: torch.device,
        folder: Path,
        against: str = "test",
        features: str = "classifier",
    ):
        dataset = config.data.dataset
        if min(len(train.images), len(held_out.images)) < MIN_IMAGES:
            raise UserError(f"{dataset} has fewer than {2 * MIN_IMAGES} images, too few to compare samples with")
        self.num_classes = int(torch.cat([train.labels, held_out.labels]).max()) + 1
        if features == "classifier" and self.num_classes == 1:
            raise UserError(
                f"{dataset} has one class, and a classifier needs two; use --features inception, or --num_samples 0 to skip "
                "the comparison"
            )
        inception = Inception().to(device) if features == "inception" else None
        self.classifier = None
        if self.num_classes > 1:
            self.classifier, path = load_or_train_classifier(config, train, self.num_classes, device, folder)
            accuracy = (predict(self.classifier, held_out.images) == held_out.labels).double().mean().item()
            print(f"Classifier {path}: accuracy {accuracy:.2%} on {len(held_out.images):,} images held out")
        self.net = inception or self.classifier
        self.reference, self.others = (held_out, train) if against == "test" else (train, held_out)
        # In random order, as files may lie in the order of their classes.
        order = random_order(len(self.reference.images))
        self.reference_features = extract_features(self.net, self.reference.images)[order.to(device)]

    def frechet_distance(self, images: torch.Tensor) -> float:
        """Return the Frechet distance of images (N, C, H, W) uint8 from the reference."""
        return frechet_distance(self.reference_features, extract_features(self.net, images))

    def quality(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        """Return Frechet distance, precision and recall of `images`, and what the classifier makes of them.

        Args:
            images: (N, C, H, W) uint8, N at least `MIN_IMAGES`.
            labels: the classes that the images were meant to show, (N,), or None.

        Returns:
            "images", N; "frechet_distance"; "precision" and "recall", compared with N images of the reference. With a
            classifier also "class_shares", the share of each class; "class_distance", half the sum of their absolute
            differences from the shares in the reference; and with labels "right_class", the share of images that show the
            class they were meant to.
        """
        features = extract_features(self.net, images)
        precision, recall = precision_recall(self.reference_features[: len(images)], features)
        figures = {
            "images": len(images),
            "frechet_distance": frechet_distance(self.reference_features, features),
            "precision": precision,
            "recall": recall,
        }
        if self.classifier:
            predicted = predict(self.classifier, images)
            shares, reference_shares = (
                classes.bincount(minlength=self.num_classes).double() / len(classes)
                for classes in (predicted, self.reference.labels)
            )
            figures["class_shares"] = shares.tolist()
            figures["class_distance"] = (shares - reference_shares).abs().sum().item() / 2
            if labels is not None:
                figures["right_class"] = (predicted == labels).double().mean().item()
        return figures

    def real_samples(self, count: int, balanced: bool = False) -> LabelledImages:
        """Return up to `count` real images outside the reference, in random order; balanced, as many of every class."""
        places = random_order(len(self.others.images))
        if balanced:  # the first image of every class, then the second of every class, and so on
            labels = one_hot(self.others.labels[places], self.num_classes)
            places = places[(labels * labels.cumsum(dim=0)).sum(dim=1).argsort(stable=True)]
        places = places[:count]
        return LabelledImages(self.others.images[places], self.others.labels[places])

    def mean_floor(self, count: int, sets: int, balanced: bool) -> float:
        """Return the mean Frechet distance of up to `sets` sets of `count` real images, chosen as by `real_samples`.

        If there are fewer than `count`, it is the distance of all of them.
        """
        images = self.real_samples(sets * count, balanced).images
        images = images[: max(len(images) // count, 1) * count]  # no smaller set beside whole ones
        return statistics.mean(map(self.frechet_distance, images.split(count)))

    def floor(self, count: int) -> dict:
        """Return the `quality` of up to `count` real images outside the reference, for comparison."""
        return self.quality(*self.real_samples(count))
