"""How good images are, by the features of a small classifier of their own data set."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

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


def train_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int = 3, batch_size: int = 128) -> Classifier:
    """A classifier of images (N, C, H, W) uint8 and labels (N,), on their device, after some epochs of Adam."""
    torch.manual_seed(seed_for("classifier"))
    net = Classifier(images.shape[1], int(labels.max()) + 1).to(images.device)
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


def accuracy(net: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images that it puts into their class."""
    right = [(net.scores(net(x)).argmax(dim=1) == y).sum() for x, y in zip(images.split(500), labels.split(500))]
    return torch.stack(right).sum().item() / len(images)


def frechet_distance(net: Classifier, real: torch.Tensor, fake: torch.Tensor) -> float:
    """Frechet's distance between the normal distributions that fit the features of two sets of images: (N, C, H, W) uint8 on
    the classifier's device, N at least 2."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import

    features = nn.Identity()  # the metric is given them, on the CPU: Apple GPUs have no float64
    features.num_features = net.num_features
    metric = FrechetInceptionDistance(features)
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(500):
            metric.update(net(part).cpu(), real=is_real)
    return metric.compute().item()
