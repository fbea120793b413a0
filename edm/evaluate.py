"""How good a checkpoint is: its samples' Frechet distance to real images, and the variational bound in bits per dimension."""

import argparse
import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

from edm import checkpoint, choices, pictures
from edm import config as configs
from edm.checkpoint import load_weights
from edm.cli import Parser, run, whole_number
from edm.config import Config
from edm.data import open_dataset, to_model_range, whole
from edm.ddpm import Chain, variational_bound
from edm.device import explain_out_of_memory, pick_device
from edm.errors import UserError
from edm.files import write_whole
from edm.generate import build_denoiser, check_chain, generate
from edm.metrics import Classifier, accuracy, frechet_distance, train_classifier
from edm.precond import Denoiser
from edm.randomness import ImageNoise
from edm.sampler import clipped

SWEEP = {  # Figure 2: a model's own sampler, DDIM, and EDM's sampler, at so many steps
    "ancestral": ([5, 10, 20, 50, 100], []),
    "ddim": ([5, 10, 20, 50, 100], []),
    "heun": ([3, 5, 10, 18, 36], ["sampler.discretization=edm", "sampler.schedule=linear", "sampler.scaling=none"]),
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace any entry of the checkpoint's config"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a diffusion-*.pt file")
    parser.add_argument(
        "--num_samples", type=whole_number(0), default=1000, help="for the distance (default: 1000; 0: without)"
    )
    parser.add_argument(
        "--num_images", type=whole_number(0), help="for the bound, of a network that knows the chain (default: 100; 0: without)"
    )
    parser.add_argument("--timesteps", type=whole_number(1), help="of a strided chain, for the bound (default: all)")
    parser.add_argument("--sweep", action="store_true", help="instead, draw the distance against the number of evaluations")
    parser.add_argument("--batch_size", type=whole_number(1), default=100, help="images at a time (default: 100)")
    parser.add_argument("--data_root", help="short for data.root=VALUE")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that there is)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output"), help="of the classifier and the picture (default: output)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    args = parser.parse_intermixed_args()
    if args.num_samples < 2 and (args.sweep or args.num_samples):
        parser.error("--num_samples: a distance takes 2 or more samples")
    if args.sweep and (args.num_images is not None or args.timesteps):
        parser.error("--sweep draws no bound; leave out --num_images and --timesteps")
    with explain_out_of_memory(f"lower --batch_size (now {args.batch_size})"):
        results = evaluate(args)
    if args.json:
        write_whole(args.json, lambda file: file.write(json.dumps(results, indent=1).encode()))


def evaluate(args: argparse.Namespace) -> dict:
    """What the arguments ask for, printed, and as plain values."""
    overrides = [*args.overrides, *([f"data.root={args.data_root}"] if args.data_root else [])]
    contents, device = checkpoint.read(args.checkpoint), pick_device(args.device)
    config = checkpoint.read_config(contents, args.checkpoint, overrides)
    check_chain(config, checkpoint.read_config(contents, args.checkpoint), args.checkpoint)
    denoiser = build_denoiser(config, contents["ema"], args.checkpoint).to(device, memory_format=torch.channels_last).eval()
    results = {"checkpoint": str(args.checkpoint), "step": contents["step"]}
    if args.sweep:
        results["sweep"] = sweep(denoiser, config, device, args.num_samples, args.batch_size, args.output_dir)
        return results
    chain = None
    if args.num_images != 0:
        try:
            chain = choices.known_chain(config, args.timesteps or config.chain.num_timesteps)
        except ValueError as error:
            if args.num_images or args.timesteps:
                raise UserError(f"the bound: {error}") from None
            print(f"No bound: {error}")
    if args.num_samples:
        results["distance"] = distance(denoiser, config, device, args.num_samples, args.batch_size, args.output_dir)
    if chain:
        results["bits_per_dimension"] = bits_per_dimension(denoiser, config, chain, device, args.num_images, args.batch_size)
    return results


def images_of(config: Config, device: torch.device, test: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) of the config's data set, on the device: of its test set, if it has one."""
    data = config.data
    dataset = open_dataset(data.dataset, data.root, data.resolution, data.channels, config.network.label_dim, test)
    images, labels = whole(dataset)
    return images.to(device), labels.to(device)


class Judge:
    """The classifier of the config's data set, trained on first use and kept in a file, and the images it compares with."""

    def __init__(self, config: Config, device: torch.device, output_dir: Path):
        data = config.data
        self.real, labels = images_of(config, device, test=True)
        train, train_labels = images_of(config, device, test=False)
        num_classes = int(train_labels.max()) + 1
        if num_classes < 2:
            raise UserError(
                f"{data.dataset} has one class, and the distance is between the features of a classifier; leave it out with "
                "--num_samples 0"
            )
        digest = hashlib.blake2b(train.cpu().numpy(), digest_size=6)
        digest.update(train_labels.cpu().numpy())
        name = f"{data.dataset}-{digest.hexdigest()}"  # of these very images
        path = output_dir / "classifier" / f"{name}.pt"
        self.net = Classifier(data.channels, num_classes).to(device).eval().requires_grad_(False)
        if path.exists():
            load_weights(self.net, checkpoint.read(path)["ema"], path)
        else:
            self.net = train_classifier(train, train_labels)
            checkpoint.write(path, {"step": 0, "name": name, "config": config.to_dict(), "ema": self.net.state_dict()})
        share = accuracy(self.net, self.real, labels)
        print(f"Judged by a classifier of {data.dataset} ({path}), right in {share:.2%} of {len(labels):,} images")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(device)
        self.train = train[order]

    def distance(self, images: torch.Tensor) -> float:
        """Of images (N, C, H, W) uint8 to the test set."""
        return frechet_distance(self.net, self.real, images.to(self.real.device))

    def floor(self, count: int) -> float:
        """Of so many training images, or of all, if there are fewer."""
        return self.distance(self.train[:count])


def samples(denoiser: Denoiser, config: Config, device: torch.device, count: int, batch_size: int) -> torch.Tensor:
    """(count, C, H, W) uint8, from seeds 0, 1, 2, ..."""
    return torch.cat([batch[-1] for batch in generate(denoiser, list(range(count)), config, device, batch_size)])


def distance(
    denoiser: Denoiser, config: Config, device: torch.device, count: int, batch_size: int, output_dir: Path
) -> dict[str, float]:
    """The Frechet distance of samples to the test set, beside that of as many training images."""
    judge = Judge(config, device, output_dir)
    found = judge.distance(samples(denoiser, config, device, count, batch_size))
    floor = judge.floor(count)
    known = min(count, len(judge.train))
    print(f"Frechet distance of {count:,} samples: {found:.1f} (of {known:,} training images: {floor:.1f})")
    return {"samples": count, "frechet_distance": found, "training_images": floor}


@torch.no_grad()
def bits_per_dimension(
    denoiser: Denoiser, config: Config, chain: Chain, device: torch.device, count: int | None, batch_size: int
) -> dict:
    """The variational bound of a chain on test images, in bits per dimension, by its terms: given their classes, if the network
    knows any, without guidance, and clipped as the config's samples are.

    Args:
        count: of how many images; None for 100, or all if there are fewer.

    Raises:
        UserError: there are fewer images.
    """
    options, label_dim = config.sampler, config.network.label_dim
    images, labels = images_of(config, device, test=True)
    if count and count > len(images):
        raise UserError(f"--num_images: there are {len(images):,} images")
    count = count or min(100, len(images))
    images, labels = images[:count], labels[:count]
    D = clipped(denoiser) if options.clip == "true" else denoiser
    dtype = torch.float32 if device.type == "mps" else torch.float64
    parts = []  # (timesteps + 1, b) of each batch, the prior's term last
    batches = list(zip(range(0, count, batch_size), images.split(batch_size), labels.split(batch_size)))
    with tqdm(total=len(batches) * len(chain), desc="the bound", unit="step", leave=False) as bar:
        for start, x, y in batches:
            x, y = to_model_range(x).to(dtype), one_hot(y, label_dim) if label_dim else None
            noise = ImageNoise(range(start, start + len(x)), tuple(x.shape[1:]), device, dtype)
            terms = []
            for term in variational_bound(D, x, chain, noise, options.variance, y):
                terms.insert(0, term)
                bar.update()
            parts.append(torch.stack([*terms, chain.like(x).prior_term(x)]).cpu().double())
    table = torch.cat(parts, dim=1)
    total, mean = table.sum(dim=0), table.mean(dim=1).tolist()
    error = total.std().item() / math.sqrt(count) if count > 1 else None
    rows = [("prior", mean[-1])]
    edges = [1 + (len(chain) - 1) * tenth // 10 for tenth in range(11)]
    for low, high in reversed([pair for pair in pairwise(edges) if pair[0] < pair[1]]):
        first, last = chain.timesteps[low].item(), chain.timesteps[high - 1].item()
        rows.append((f"timesteps {first} to {last}" if first < last else f"timestep {first}", sum(mean[low:high])))
    rows.append(("reconstruction", mean[0]))
    print(f"Bits per dimension, {count:,} images, {len(chain)} of {config.chain.num_timesteps} timesteps, {options.variance}:")
    for name, value in rows:
        print(f"  {name:<24} {value:8.4f}")
    print(f"  {'all':<24} {total.mean().item():8.4f}" + (f" +- {error:.4f}" if error else ""))
    return {
        "images": count,
        "timesteps": chain.timesteps.tolist(),
        "variance": options.variance,
        "prior": mean[-1],
        "terms": mean[:-1],
        "total": total.mean().item(),
        "standard_error": error,
    }


def sweep(
    denoiser: Denoiser, config: Config, device: torch.device, count: int, batch_size: int, output_dir: Path
) -> dict[str, list]:
    """The distance against the number of evaluations an image, for several samplers on one network (the paper's Figure 2).

    Returns:
        {solver: [(evaluations, distance), ...]}, and the training images' distance as "floor".
    """
    judge = Judge(config, device, output_dir)
    curves = {}
    for solver, (numbers, others) in SWEEP.items():
        curves[solver] = []
        for steps in numbers:
            overrides = [f"sampler.solver={solver}", f"sampler.sampling_steps={steps}", *others]
            try:
                varied = configs.from_dict(config.to_dict(), config.name, "the sweep", overrides)
            except UserError as error:
                print(f"{solver} at {steps} steps is left out: {error}")
                continue
            calls = []
            with denoiser.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
                found = judge.distance(samples(denoiser, varied, device, count, batch_size))
            evaluations = len(calls) // math.ceil(count / batch_size)  # of every batch
            curves[solver].append((evaluations, found))
            print(f"{solver:<10} {evaluations:5} evaluations: {found:8.1f}", flush=True)
    floor = judge.floor(count)
    print(f"{min(count, len(judge.train)):,} training images: {floor:.1f}")
    path = output_dir / "image" / config.data.dataset / "evaluate" / config.name / "sweep.png"
    pictures.save_sweep(path, curves, floor, f"Frechet distance of {count:,} samples")
    print(f"the picture is {path}")
    return {**curves, "floor": floor}


if __name__ == "__main__":
    run(main)
