"""How good images are, by their features: those of a small classifier of their own data set, or Inception's."""

import functools

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from edm.errors import UserError
from edm.randomness import generator_for, seed_for

MIN_STEPS = 200  # of training a classifier, however few the images are


class Classifier(nn.Module):
    """Three convolutions, and 64 features under the classes' scores.

    Args:
        channels: of the images, uint8 (B, channels, H, W) of 8 pixels or more.
        num_classes: at least 2, if the features are to mean anything.
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
        """uint8 (B, C, H, W) -> the features (B, 64)."""
        return self.features(images.float() / 127.5 - 1)


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, num_classes: int, epochs: int = 3, batch_size: int = 128
) -> Classifier:
    """A classifier of images (N, C, H, W) uint8 and labels (N,), on their device, after some epochs of Adam."""
    torch.manual_seed(seed_for("classifier"))
    net = Classifier(images.shape[1], num_classes).to(images.device)
    steps = max(epochs * len(images) // batch_size, MIN_STEPS)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="training the classifier", unit="step", leave=False):
        index = torch.randint(len(images), (batch_size,), generator=generator_for("classifier", step)).to(images.device)
        loss = cross_entropy(net.scores(net(images[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def predictions(net: Classifier, images: torch.Tensor) -> torch.Tensor:
    """The class that it puts each of the images in, (N,)."""
    return torch.cat([net.scores(net(part)).argmax(dim=1) for part in images.split(500)])


class Inception(nn.Module):
    """The 2048 features of torchvision's Inception v3, trained on ImageNet: downloaded on first use. They are not those of the
    published FIDs, whose weights are others."""

    num_features = 2048

    def __init__(self):
        super().__init__()
        from torchvision.models import Inception_V3_Weights, inception_v3  # slow to import

        try:
            self.net = inception_v3(weights=Inception_V3_Weights.IMAGENET1K_V1)
        except (OSError, RuntimeError) as error:  # a failed download, a damaged one
            raise UserError(
                f"torchvision's Inception could not be downloaded or read ({str(error).partition(chr(10))[0]})"
            ) from None
        self.net.transform_input = False  # from ImageNet's normalisation to what `forward` gives it, [-1, 1]
        self.net.fc = nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 1 or 3, H, W) -> (B, 2048)."""
        images = images.expand(-1, 3, -1, -1).float()
        return self.net(interpolate(images, size=(299, 299), mode="bilinear", antialias=True) / 127.5 - 1)


def features_of(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) uint8, on the network's device -> features (N, F)."""
    parts = tqdm(images.split(100), desc="features", leave=False)
    with torch.no_grad():
        return torch.cat([net(part) for part in parts])


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Frechet's distance between the normal distributions that fit two sets of features, (N, F) each, N at least 2."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import

    identity = nn.Identity()  # the metric is given features, on the CPU: Apple GPUs have no float64
    identity.num_features = real.shape[1]
    metric = FrechetInceptionDistance(identity, sync_on_compute=False)  # other processes do not compute it
    metric.update(real.cpu(), real=True)
    metric.update(fake.cpu(), real=False)
    return metric.compute().item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """The share of samples that lie among the data, and of the data that lie among the samples (Kynkaanniemi et al., 2019,
    arXiv 1904.06991): within the distance from some one of them to the k-th nearest of its own kind.

    Args:
        real, fake: features, (N, F) and (M, F), N and M above k.
    """

    def share(points: torch.Tensor, others: torch.Tensor) -> float:
        # Matrix products would find the distance as a difference of large numbers, and copies apart.
        cdist = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = [cdist(part, others).topk(k + 1, largest=False).values for part in others.split(1000)]  # the first is itself
        radii = torch.cat(nearest)[:, k]
        within = [(cdist(part, others) <= radii).any(dim=1) for part in points.split(1000)]
        return torch.cat(within).double().mean().item()

    return share(fake, real), share(real, fake)
