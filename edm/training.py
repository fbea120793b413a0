"""The training loop (the paper's Section 5 and Appendix F), and what surrounds it: pictures, checkpoints, a record."""

import shlex
import time
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

from edm import checkpoint, pictures
from edm.augment import augment
from edm.checkpoint import saved_steps
from edm.config import Config, chosen
from edm.data import batches, open_dataset, to_model_range
from edm.device import autocast, autocast_dtype
from edm.ema import EMA
from edm.errors import UserError
from edm.generate import build_denoiser, generate, grid_columns
from edm.loss import NOISE_DISTRIBUTIONS, WEIGHTINGS, denoising_loss
from edm.losslog import LossLog
from edm.randomness import generator_for, seed_for


class Learner:
    """What a training step changes and a checkpoint holds: the network, its average, the optimizer, the gradient scaler.

    Args:
        config: the run.
        device: where everything lives.
    """

    def __init__(self, config: Config, device: torch.device):
        training = config.training
        torch.manual_seed(seed_for(training.seed, "initial weights"))
        net = build_denoiser(config).to(device, memory_format=torch.channels_last).train()
        self.config, self.device, self.net = config, device, net
        self.precision = autocast_dtype(training.mixed_precision, device)
        self.ema = EMA(net, config.ema.halflife_images, config.ema.rampup_ratio)
        self.optimizer = torch.optim.Adam(
            net.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=device.type != "mps",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.noise_distribution = chosen(NOISE_DISTRIBUTIONS, config.loss.noise_distribution, config.loss)

    def step(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        """One training step, without waiting for the device.

        Args:
            images: (B, C, H, W) uint8, the whole batch.
            labels: (B,), class indices.
            step: its number, from 1; all its random draws depend on this and the seed alone.

        Returns:
            The mean loss of the batch, a scalar tensor on the device.
        """
        training, loss, network = self.config.training, self.config.loss, self.config.network
        batch_size, conditions = len(images), {}
        generator = generator_for(training.seed, "step", step, device=self.device)
        torch.manual_seed(seed_for(training.seed, "dropout", step))
        y = to_model_range(images)
        if network.augment_dim:
            y, conditions["augment_labels"] = augment(y, self.config.data.augment_probability, generator)
        y = y.contiguous(memory_format=torch.channels_last)
        sigma = self.noise_distribution.sample(batch_size, generator)
        n = torch.randn(y.shape, generator=generator, device=self.device) * sigma[:, None, None, None]
        weight = WEIGHTINGS[loss.weighting](sigma, self.config.preconditioning.sigma_data)
        if network.label_dim:
            kept = torch.rand(batch_size, generator=generator, device=self.device) >= loss.label_dropout
            conditions["labels"] = one_hot(labels, network.label_dim) * kept[:, None]
        whole = {"y": y, "n": n, "sigma": sigma, "weight": weight, **conditions}

        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in zip(*(tensor.chunk(training.accumulation) for tensor in whole.values())):
            with autocast(self.device, self.precision):
                part_loss = denoising_loss(self.net, **dict(zip(whole, part))).sum() / batch_size
            self.scaler.scale(part_loss).backward()
            losses.append(part_loss.detach())
        self.update(step * batch_size, batch_size)
        return torch.stack(losses).sum()

    def update(self, images_seen: int, batch_size: int) -> None:
        """Adam's step with the gradients at hand, then the average's."""
        training = self.config.training
        self.scaler.unscale_(self.optimizer)  # notes an overflow, before the gradients are mended
        for parameter in self.net.parameters():
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), training.max_grad_norm)
        learning_rate = training.learning_rate * min(images_seen / max(training.lr_rampup_images, 1), 1)
        if training.lr_halflife_images is not None:
            learning_rate *= 0.5 ** (images_seen / training.lr_halflife_images)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.net, images_seen, batch_size)

    def state_dict(self) -> dict:
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],  # its settings are the config's
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict, path: Path) -> None:
        """Go on from a training checkpoint's contents.

        Raises:
            UserError: they are of another network, or hold weights only.
        """
        if not {"net", "optimizer", "scaler"} <= state.keys():
            raise UserError(
                f"{path} holds weights alone, so no run can go on from it; use --load_model_weights_from_checkpoint"
            )
        checkpoint.load_weights(self.net, state["net"], path)
        checkpoint.load_weights(self.ema.net, state["ema"], path)
        try:
            for index, parameter in enumerate(self.net.parameters()):  # Adam would write past the end of smaller tensors
                moments = state["optimizer"][index]
                if (
                    not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
                    or moments["step"].numel() != 1
                ):
                    raise ValueError
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]})
            if state["scaler"]:  # empty unless the run was in fp16
                self.scaler.load_state_dict(state["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(f"the optimizer's or the scaler's state in {path} does not fit its network") from None


def train(
    config: Config,
    device: torch.device,
    output_dir: Path,
    resume_from: str | None = None,
    weights_from: str | None = None,
    overwrite: bool = False,
) -> None:
    """Train, writing samples and checkpoints to `output_dir`/image/<dataset>/<config name> on the way.

    Args:
        resume_from: a checkpoint to go on from exactly as if the run had never stopped, or "latest".
        weights_from: a checkpoint whose (averaged) weights a new run starts with.
        overwrite: let the first checkpoint replace all those of an earlier run in the folder.

    Raises:
        UserError: whatever a person can mend.
    """
    training = config.training
    folder = output_dir / "image" / config.data.dataset / config.name
    learner = Learner(config, device)
    dataset = open_dataset(
        config.data.dataset, config.data.root, config.data.resolution, config.data.channels, config.network.label_dim
    )
    first_step = start(learner, folder, resume_from, weights_from, overwrite)
    if first_step >= training.num_training_steps:
        raise UserError(f"the run is at step {first_step} already; ask for more with --num_training_steps")
    stream = batches(dataset, training.batch_size, training.seed, first_step, device, config.data.max_resident_mb)
    log = LossLog(folder / "metrics.jsonl", first_step)
    print(
        f"{config.name}: {sum(p.numel() for p in learner.net.parameters()) / 1e6:.2f} M parameters, {len(dataset):,} images of "
        f"{config.data.dataset}, on {device} in {str(learner.precision).removeprefix('torch.')}, to {folder}"
    )

    superseded = [step for step in saved_steps(folder) if step > first_step]  # another run's, kept until this one has saved
    began, step = time.monotonic(), first_step
    try:
        with tqdm(desc=config.name, initial=first_step, total=training.num_training_steps, unit="step", mininterval=0.5) as bar:
            for step in range(first_step + 1, training.num_training_steps + 1):
                images, labels = next(stream)
                log.add(learner.step(images, labels, step), step=step, images=step * training.batch_size)
                if bar.update():  # the bar was due to be drawn: the one time that losses are fetched
                    rate = (bar.format_dict["rate"] or 0) * training.batch_size
                    bar.set_postfix_str(f"loss {log.flush():.1f}, {rate:.0f} images/s")
                if step % training.save_and_sample_every_n == 0 or step == training.num_training_steps:
                    save(learner, log, folder, step)
                    retire(folder, superseded, step, overwrite)
                    superseded = []
    except KeyboardInterrupt:
        saved = [saved for saved in saved_steps(folder) if saved not in superseded]
        way_on = (
            f"the same command with --resume_from latest goes on from step {saved[-1]}" if saved else "nothing was saved yet"
        )
        print(f"\nStopped in step {step}; {way_on}")
        raise SystemExit(130) from None
    say_goodbye(folder, step - first_step, step, time.monotonic() - began, config.sampler.num_samples)


def start(learner: Learner, folder: Path, resume_from: str | None, weights_from: str | None, overwrite: bool) -> int:
    """Prepare a new run or load the checkpoint of an old one; returns the step that is done already."""
    if resume_from is None:
        steps = saved_steps(folder)
        if steps and not overwrite:
            raise UserError(
                f"{folder} holds the checkpoints of another run, up to step {steps[-1]}: "
                "go on from them with --resume_from latest, or replace them with --overwrite"
            )
        if weights_from is not None:
            weights = checkpoint.read(weights_from)["ema"]
            for net in (learner.net, learner.ema.net):
                checkpoint.load_weights(net, weights, weights_from)
        return 0

    path, contents = latest(folder) if resume_from == "latest" else (Path(resume_from), checkpoint.read(resume_from))
    learner.load_state_dict(contents, path)
    changed = differences(checkpoint.read_config(contents, path), learner.config)
    print(f"Going on from {path}" + (f", though with another {', '.join(changed)}" if changed else ""))
    return contents["step"]


def latest(folder: Path) -> tuple[Path, dict]:
    """The newest whole checkpoint in a folder; a damaged one is named and passed over."""
    for step in reversed(saved_steps(folder)):
        path = checkpoint.checkpoint_path(folder, step)
        try:
            return path, checkpoint.read(path)
        except UserError as error:
            print(f"{error}; trying the one before it")
    raise UserError(f"--resume_from latest: there is no whole checkpoint in {folder}; leave the option out to start a new run")


def differences(old: Config, new: Config) -> list[str]:
    """The entries, "section.key", that bear on the course of training and differ."""
    old, new = old.to_dict(), new.to_dict()
    free = {"training.num_training_steps", "training.save_and_sample_every_n", "data.root", "data.max_resident_mb"}
    entries = [(section, key) for section in old if section != "sampler" for key in old[section]]
    return [f"{s}.{key}" for s, key in entries if old[s][key] != new[s][key] and f"{s}.{key}" not in free]


def sample_path(folder: Path, step: int) -> Path:
    return folder / f"sample-{step}.png"


def retire(folder: Path, steps: list[int], saved: int, delete: bool) -> None:
    """Delete the checkpoints of a replaced run, or set them aside, so that "latest" is never one of them; `saved` is new."""
    for step in steps:
        path = checkpoint.checkpoint_path(folder, step)
        if step != saved and delete:
            path.unlink(missing_ok=True)
            sample_path(folder, step).unlink(missing_ok=True)
        elif step != saved:
            path.replace(path.with_name(f"{path.name}.old"))


def save(learner: Learner, log: LossLog, folder: Path, step: int) -> None:
    """Write the checkpoint of a step, then its samples and the loss curve so far."""
    config = learner.config
    log.flush()
    contents = {"step": step, "name": config.name, "config": config.to_dict(), **learner.state_dict()}
    checkpoint.write(checkpoint.checkpoint_path(folder, step), contents)
    pictures.save_loss_curve(folder / "loss.png", log.steps, log.losses)
    seeds = list(range(config.sampler.num_samples))
    batch_size = 4 * config.training.batch_size  # without gradients there is room for more
    frames = generate(learner.ema.net, seeds, config, learner.device, batch_size, learner.precision)
    images = torch.cat([batch[-1] for batch in frames])
    pictures.save_image(sample_path(folder, step), pictures.grid(images, columns=grid_columns(seeds, config.network.label_dim)))


def say_goodbye(folder: Path, steps: int, step: int, seconds: float, num_samples: int) -> None:
    """Tell where things are, and what to do next."""
    path = checkpoint.checkpoint_path(folder, step)
    print(
        f"Done: {steps} steps in {seconds / 60:.1f} minutes.\n"
        f"  samples     {sample_path(folder, step)}\n"
        f"  checkpoint  {path}\n"
        f"  losses      {folder / 'loss.png'}, {folder / 'metrics.jsonl'}\n"
        f"Next: python sample.py --checkpoint {shlex.quote(str(path))} --num_samples {num_samples} --gif"
    )
