"""Train a diffusion model as a config says: by default EDM on MNIST, with configs/edm.yaml."""

# First, as from here on Ctrl-C ends without a traceback.
from lab.cli import Parser, UserError, run_script

# isort: split
import argparse
from itertools import repeat
from pathlib import Path

import torch
from torch.nn.functional import one_hot

from edm.augment import augment
from edm.loss import squared_error
from lab.build import build_chain_loss, build_sampler, build_weighting
from lab.config import Config, load
from lab.data import batches, open_dataset, to_model_range, with_measured_sigma_data
from lab.device import autocast, explain_device_errors
from lab.distributed import World, distributed
from lab.generate import save_grid
from lab.learner import Learner
from lab.run import Run
from lab.seeds import generator_for, seed_for


def main() -> None:
    args = parse_arguments()
    flags = [f"{entry}={getattr(args, flag)}" for flag, entry in FLAGS.items() if getattr(args, flag) is not None]
    config = load(args.config_path, [*args.overrides, *flags])
    advice = (
        f"lower training.batch_size (now {config.training.batch_size}), raise training.accumulation (now "
        f"{config.training.accumulation}), or choose training.mixed_precision=fp16 or bf16"
    )
    with distributed(args.device) as (device, world), explain_device_errors(advice):
        train(config, args, device, world)


def train(config: Config, args: argparse.Namespace, device: torch.device, world: World) -> None:
    """Train on the device, together with the other ranks of `world`. Everything is written to the run's folder.

    Raises:
        UserError: a cause that the user can correct.
        SystemExit: a signal asked the run to stop, after a checkpoint of the last step.
    """
    training, batch_size, label_dim = config.training, config.training.batch_size, config.network.label_dim
    if batch_size < world.size:
        raise UserError(f"training.batch_size: {batch_size} images cannot be divided between {world.size} processes")
    if config.sampler.guide:
        raise UserError("sampler.guide: training draws its samples without a guide; give one to sample.py as --guide")
    dataset = world.rank_zero_first(lambda: open_dataset(config))
    config = world.broadcast(lambda: with_measured_sigma_data(config, dataset))
    with Run(args.output_dir / "image" / config.data.dataset / config.name, config, world) as run:
        build_sampler(config)  # raises now if its choices do not fit together, not at the first sample grid
        weighting = build_weighting(config)  # lambda(sigma)
        chain_loss = build_chain_loss(config)  # None, except for Improved DDPM
        learner = Learner(config, device, world)
        net = world.wrap(learner.net)  # the denoiser D(x; sigma) (Eq. 7); its gradients are averaged over the ranks
        ema = learner.ema  # the moving average of its weights, which all samples come from
        noise_distribution = learner.noise_distribution  # where sigma is drawn from
        first_step = run.start(learner, args.resume_from, args.load_model_weights_from_checkpoint, args.overwrite)
        run.announce(learner, len(dataset), device)
        if run.lacks_grid(first_step):
            save_grid(run.grid(first_step), ema.net, config, device, learner.precision, world, run.is_asked_to_stop)

        shard = world.shard(batch_size)  # the part of every batch that this rank computes
        stream = batches(dataset, config, first_step, device, world)
        step = first_step
        for step in run.steps(first_step):
            images, labels = next(stream)

            # Draw. The draws depend on the seed and the step alone: each rank draws for the whole batch and keeps its shard.
            generator = generator_for(training.seed, "step", step, device=device)
            torch.manual_seed(seed_for(training.seed, "dropout", step) + shard.start)  # dropout alone differs between ranks
            y, augment_labels = to_model_range(images), None
            if config.network.augment_dim:
                y, augment_labels = augment(y, config.data.augment_probability, generator, batch_size, shard)
            y = y.contiguous(memory_format=torch.channels_last)
            sigma = noise_distribution.sample(batch_size, generator)[shard]
            n = sigma[:, None, None, None] * torch.randn(batch_size, *y.shape[1:], generator=generator, device=device)[shard]
            importance = noise_distribution.importance(sigma)  # 1, unless timesteps are drawn by importance
            labels = one_hot(labels, label_dim) if label_dim else None
            if label_dim:  # hide some labels, so that the network also learns to denoise without them, for guidance
                is_shown = torch.rand(batch_size, generator=generator, device=device)[shard] >= config.loss.label_dropout
                labels = labels * is_shown[:, None]

            # Compute the loss, its mean over the batch, and the gradient; in parts, if the batch does not fit into memory.
            batch, seen = (y, n, sigma, weighting(sigma), importance, labels, augment_labels), []
            parts = split(batch, training.accumulation)
            for part in parts:
                y, n, sigma, weight, importance, labels, augment_labels = part
                with world.no_sync(net, last=part is parts[-1]):
                    with autocast(device, learner.precision):
                        if chain_loss is None:
                            D = net(y + n, sigma, labels, augment_labels)
                            loss = weight * squared_error(D, y)  # lambda(sigma) |D(y + n; sigma) - y|^2 (Eq. 8)
                        else:
                            loss = chain_loss(net, y, n, sigma, weight, labels=labels, augment_labels=augment_labels)
                        mean = (importance * loss).sum() / batch_size
                    learner.scaler.scale(mean * world.size).backward()  # the ranks' gradients are averaged, not summed
                seen.append(torch.stack([sigma, importance, loss.detach()]))

            # Update the weights by Adam, at a learning rate that ramps up, then their averages.
            learner.optimizer_step(step * batch_size)
            for average in (ema, *learner.power_ema.values()):
                average.update(step * batch_size, batch_size)

            # Record the losses of the whole batch. Every `save_and_sample_every_n` steps and after the last one, write a
            # checkpoint and a grid of samples. When a signal has asked the run to stop, write a checkpoint.
            sigma, importance, loss = world.all_gather(list(torch.cat(seen, dim=1)), batch_size)
            noise_distribution.update(sigma, loss)
            run.record(loss, sigma, importance)
            if run.is_snapshot_due(step):
                run.save_snapshot(step, learner)
            if run.is_due(step) or run.stopping:
                run.save(step, learner)
            if run.is_due(step) and not run.stopping:
                save_grid(run.grid(step), ema.net, config, device, learner.precision, world, run.is_asked_to_stop)
        run.finish(first_step, step)


def split(batch: tuple[torch.Tensor | None, ...], number: int) -> list[tuple[torch.Tensor | None, ...]]:
    """Split the tensors of a batch into `number` parts; what is None is None in every part."""
    return list(zip(*(repeat(None) if tensor is None else tensor.chunk(number) for tensor in batch)))


FLAGS = {  # flags that stand for entries of the config
    "num_training_steps": "training.num_training_steps",
    "batch_size": "training.batch_size",
    "save_and_sample_every_n": "training.save_and_sample_every_n",
    "mixed_precision": "training.mixed_precision",
    "seed": "training.seed",
    "data_root": "data.root",
}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace any entry of the config")
    parser.add_argument("--config_path", default="configs/edm.yaml", help="the YAML config")
    for flag, entry in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="VALUE", help=f"short for {entry}=VALUE")
    parser.add_argument("--resume_from", metavar="CHECKPOINT", help="go on from a checkpoint, or from the run's 'latest'")
    parser.add_argument(
        "--load_model_weights_from_checkpoint", metavar="CHECKPOINT", help="start a new run with its averaged weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="move an earlier run in the same folder aside, and start anew")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that this machine has)")
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="where everything is written")
    args = parser.parse_intermixed_args()
    if args.resume_from and args.load_model_weights_from_checkpoint:
        parser.error("--resume_from goes on with its own weights; leave out --load_model_weights_from_checkpoint")
    return args


if __name__ == "__main__":
    run_script(main)
