"""What samples are judged by: the real images of their data set, and the features in which they are compared."""

import hashlib
from pathlib import Path

import torch

from edm import checkpoint
from edm.checkpoint import load_weights
from edm.config import Config
from edm.data import HAVE_TEST_SETS, open_dataset, whole
from edm.errors import UserError
from edm.metrics import (
    Classifier,
    Inception,
    features_of,
    frechet_distance,
    precision_recall,
    predictions,
    train_classifier,
)

NEIGHBOUR = 3  # the nearest of its own kind to which an image's surroundings reach, for precision and recall
MIN_IMAGES = NEIGHBOUR + 1


Labelled = tuple[torch.Tensor, torch.Tensor]  # images (N, C, H, W) uint8 and labels (N,)


def images_of(config: Config, device: torch.device, test: bool) -> Labelled:
    """Those of the config's data set, on the device: of its test set, if it has one."""
    data = config.data
    dataset = open_dataset(data.dataset, data.root, data.resolution, data.channels, config.network.label_dim, test)
    images, labels = whole(dataset)
    return images.to(device), labels.to(device)


def shuffled(images: torch.Tensor, labels: torch.Tensor) -> Labelled:
    """Both in one random order, always the same."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
    return images[order], labels[order]


def real_images(config: Config, device: torch.device) -> tuple[Labelled, Labelled]:
    """The training images of the config's data set, and those that it holds back: its test images, or, where it has none, the
    first half of all, the second half being what counts as its training images (though a network may have learned both)."""
    train = images_of(config, device, test=False)
    if config.data.dataset in HAVE_TEST_SETS:
        return train, images_of(config, device, test=True)
    images, labels = shuffled(*train)
    half = len(images) // 2
    return (images[half:], labels[half:]), (images[:half], labels[:half])


def name_of(config: Config, against: str) -> str:
    """What `real_images` gives, in words."""
    if config.data.dataset in HAVE_TEST_SETS:
        return {"test": "test images", "train": "training images"}[against]
    return {"test": "one half of the images", "train": "the other half of the images"}[against]


class Judge:
    """Compares images with those that the config's data set holds back (`real_images`), or with its training images.

    Args:
        config: of the network whose samples are judged.
        device: where the features are computed.
        output_dir: holds the classifier, trained on the training images on first use.
        against: "test" or "train".
        features: "classifier" or "inception".

    Raises:
        UserError: too few images, or too few classes for a classifier; no Inception.
    """

    def __init__(
        self, config: Config, device: torch.device, output_dir: Path, against: str = "test", features: str = "classifier"
    ):
        train, test = real_images(config, device)
        if min(len(train[0]), len(test[0])) < MIN_IMAGES:
            raise UserError(f"{config.data.dataset} has too few images to compare samples with, fewer than {2 * MIN_IMAGES}")
        inception = Inception().to(device) if features == "inception" else None
        self.num_classes = int(torch.cat([train[1], test[1]]).max()) + 1
        self.classifier = self.load_classifier(config, train, test, output_dir) if self.num_classes > 1 else None
        self.net = inception or self.classifier
        if self.net is None:
            raise UserError(
                f"{config.data.dataset} has one class, of which no classifier has features; ask for --features inception, or "
                "leave the distance out with --num_samples 0"
            )
        (self.real, self.labels), (self.others, self.other_labels) = (
            shuffled(*images) for images in ((test, train) if against == "test" else (train, test))
        )
        self.real_features = features_of(self.net, self.real)

    def load_classifier(self, config: Config, train: Labelled, test: Labelled, output_dir: Path) -> Classifier:
        """From the file of the one that was trained on these very images, or newly trained; its accuracy is printed."""
        data = config.data
        digest = hashlib.blake2b(train[0].cpu().numpy(), digest_size=6)
        digest.update(train[1].cpu().numpy())
        name = f"{data.dataset}-{digest.hexdigest()}"
        path = output_dir / "classifier" / f"{name}.pt"
        if path.exists():
            net = Classifier(data.channels, self.num_classes).to(train[0].device).eval().requires_grad_(False)
            load_weights(net, checkpoint.read(path)["ema"], path)
        else:
            net = train_classifier(*train, self.num_classes)
            checkpoint.write(path, {"step": 0, "name": name, "config": config.to_dict(), "ema": net.state_dict()})
        share = (predictions(net, test[0]) == test[1]).double().mean().item()
        print(f"Judged by a classifier ({path}), right in {share:.2%} of {len(test[0]):,} images it has not seen")
        return net

    def distance(self, images: torch.Tensor) -> float:
        """The Frechet distance of images (N, C, H, W) uint8 to the real ones."""
        return frechet_distance(self.real_features, features_of(self.net, images.to(self.real.device)))

    def floor_distance(self, count: int) -> float:
        """The distance of so many real images that are not among those compared with, or of all, if there are fewer."""
        return self.distance(self.others[:count])

    def quality(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        """Of images (N, C, H, W) uint8, N at least `MIN_IMAGES`, and the classes they were meant to be, (N,), if any.

        Returns:
            "frechet_distance"; "precision" and "recall" beside as many of the real images; with a classifier "class_shares",
            as it sees them, "class_distance", half the sum of their differences to the real images', and
            "right_class", the share of images that are of the class they were meant to be.
        """
        images = images.to(self.real.device)
        features = features_of(self.net, images)
        precision, recall = precision_recall(self.real_features[: len(images)], features, NEIGHBOUR)
        found = {
            "images": len(images),
            "frechet_distance": frechet_distance(self.real_features, features),
            "precision": precision,
            "recall": recall,
        }
        if self.classifier:
            seen = predictions(self.classifier, images)
            shares, real_shares = (
                classes.bincount(minlength=self.num_classes).double() / len(classes) for classes in (seen, self.labels)
            )
            found["class_shares"] = shares.tolist()
            found["class_distance"] = (shares - real_shares).abs().sum().item() / 2
            if labels is not None:
                found["right_class"] = (seen == labels.to(seen.device)).double().mean().item()
        return found

    def floor(self, count: int) -> dict:
        """Their quality."""
        return self.quality(self.others[:count], self.other_labels[:count])
