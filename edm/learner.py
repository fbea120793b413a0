"""The training step (the paper's Section 5 and Appendix F): what it changes is what a checkpoint holds."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import one_hot

from edm import checkpoint, choices
from edm.augment import augment
from edm.compiling import compile_network, is_compiled, is_launch_bound, is_wanted
from edm.config import Config
from edm.data import to_model_range
from edm.device import autocast, autocast_dtype
from edm.distributed import Processes
from edm.ema import EMA
from edm.errors import UserError
from edm.generate import build_denoiser
from edm.loss import NOISE_BANDS, WEIGHTINGS, by_noise_level
from edm.published import is_plain
from edm.randomness import generator_for, seed_for


class Learner:
    """What a training step changes and a checkpoint holds: the network, its average, the optimizer, the gradient scaler, and
    what the noise distribution has learned.

    Args:
        config: the run.
        device: where everything lives.
        processes: between which a batch is divided.
    """

    def __init__(self, config: Config, device: torch.device, processes: Processes | None = None):
        training = config.training
        torch.manual_seed(seed_for(training.seed, "initial weights"))
        # Channels last is what convolutions are fastest in. It moves D and its gradients by less than 2e-5 of their size.
        net = build_denoiser(config).to(device, memory_format=torch.channels_last).train()
        self.config, self.device, self.net = config, device, net
        self.processes = processes or Processes()
        self.parallel_net = self.processes.wrap(net)
        self.precision = autocast_dtype(training.mixed_precision, device)
        self.ema = EMA(net, config.ema.halflife_images, config.ema.rampup_ratio)
        self.optimizer = torch.optim.Adam(
            net.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=device.type != "mps",
        )
        self.parameters = list(net.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.objective = choices.objective(config)
        with device:
            self.noise_distribution = choices.noise_distribution(config)
            self.noise_bands = torch.tensor(NOISE_BANDS)

    def step(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
        """One training step, without waiting for the device.

        Args:
            images: (b, C, H, W) uint8, this process's share of the batch: all of it, B, for a process alone.
            labels: (b,), class indices.
            step: its number, from 1; all its random draws depend on this, the place in the batch and the seed alone.

        Returns:
            (1 + bands,) on the device: the mean loss of the whole batch, and those of its images in each of the `NOISE_BANDS`,
            nan where there are none.
        """
        batch_size = self.config.training.batch_size
        drawn = self.draw(images, labels, step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.backward(drawn)
        self.update(step * batch_size, batch_size)
        sigma, importance, losses = self.processes.whole([drawn["sigma"], drawn["importance"], losses], batch_size)
        self.noise_distribution.update(sigma, losses)
        return torch.cat([(importance * losses).mean()[None], by_noise_level(losses, sigma, importance, self.noise_bands)])

    def draw(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """What the loss is computed from: clean images, noise, noise levels, weights, importance and conditions of each."""
        training, loss, network = self.config.training, self.config.loss, self.config.network
        batch_size, conditions = training.batch_size, {}
        mine = self.processes.share(batch_size)
        generator = generator_for(training.seed, "step", step, device=self.device)
        torch.manual_seed(seed_for(training.seed, "dropout", step) + mine.start)
        y = to_model_range(images)
        if network.augment_dim:
            probability = self.config.data.augment_probability
            y, conditions["augment_labels"] = augment(y, probability, generator, batch_size, mine)
        y = y.contiguous(memory_format=torch.channels_last)
        sigma = self.noise_distribution.sample(batch_size, generator)[mine]
        noise = torch.randn(batch_size, *y.shape[1:], generator=generator, device=self.device)[mine]
        n = noise * sigma[:, None, None, None]
        weight = WEIGHTINGS[loss.weighting](sigma, self.config.preconditioning.sigma_data)
        importance = self.noise_distribution.importance(sigma)
        if network.label_dim:
            kept = torch.rand(batch_size, generator=generator, device=self.device)[mine] >= loss.label_dropout
            conditions["labels"] = one_hot(labels, network.label_dim) * kept[:, None]
        return {"importance": importance, "y": y, "n": n, "sigma": sigma, "weight": weight, **conditions}

    def forward(self, net: nn.Module, importance: torch.Tensor, **part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What images of `draw` add to the loss of the whole batch, and the loss of each, (b,)."""
        with autocast(self.device, self.precision):
            losses = self.objective(net, **part)
            return (importance * losses).sum() / self.config.training.batch_size, losses.detach()

    def backward(self, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add up the gradients of the loss, part by part; returns the loss of each image, (b,)."""
        parts, losses = self.parts(drawn), []
        for part in parts:
            with self.processes.part(self.parallel_net, last=part is parts[-1]):
                loss, each = self.forward(self.parallel_net, **part)
                self.scaler.scale(loss * self.processes.size).backward()  # whose gradients are averaged, not summed
            losses.append(each)
        return torch.cat(losses)

    def parts(self, drawn: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The parts that a batch is computed in."""
        chunks = zip(*(tensor.chunk(self.config.training.accumulation) for tensor in drawn.values()))
        return [dict(zip(drawn, chunk)) for chunk in chunks]

    def update(self, images_seen: int, batch_size: int) -> None:
        """Adam's step with the gradients at hand, then the average's."""
        training = self.config.training
        self.scaler.unscale_(self.optimizer)  # notes an overflow, before the gradients are mended
        for parameter in self.parameters:  # one by one, as PyTorch cannot do this for all at once
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, training.max_grad_norm)
        learning_rate = training.learning_rate * min(images_seen / max(training.lr_rampup_images, 1), 1)
        if training.lr_halflife_images is not None:
            learning_rate *= 0.5 ** (images_seen / training.lr_halflife_images)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(images_seen, batch_size)

    def compile(self, steps: int, decided: bool | None) -> None:
        """Compile the raw network, if the config's `training.compile` and `compiling.is_wanted` say so and if it works.

        Args:
            steps: how many there are to come.
            decided: whether it was compiled, in a run that goes on.
        """
        data, training = self.config.data, self.config.training
        mine = self.processes.share(training.batch_size)
        count = mine.stop - mine.start
        images = torch.zeros(count, data.channels, data.resolution, data.resolution, dtype=torch.uint8, device=self.device)
        parts = self.parts(self.draw(images, torch.zeros(count, dtype=torch.int64, device=self.device), step=0))

        def rehearse() -> None:  # without the other processes, should it fail in one of them
            for part in {len(part["y"]): part for part in parts}.values():  # one of each length
                self.scaler.scale(self.forward(self.net, **part)[0]).backward()
                self.optimizer.zero_grad(set_to_none=True)

        wanted = steps > 0 and is_wanted(training.compile, self.device, rehearse, steps * training.accumulation, decided)
        if self.processes.highest(wanted):
            parameters = sum(parameter.numel() for parameter in self.parameters)
            cuda_graphs = is_launch_bound(self.device, parameters, training.accumulation, self.processes.size)
            compile_network(self.net.model, rehearse, cuda_graphs)
            self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Live views, not copies."""
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],  # its settings are the config's
            "scaler": self.scaler.state_dict(),
            "noise_distribution": self.noise_distribution.state_dict(),
            "compiled": is_compiled(self.net.model),
        }

    def load_state_dict(self, state: dict, path: Path) -> None:
        """Go on from a training checkpoint's contents.

        Raises:
            UserError: they are of another network, damaged, or hold weights only.
        """
        if not {"net", "optimizer", "scaler"} <= state.keys():
            raise UserError(
                f"{path} holds weights alone, so no run can go on from it; use --load_model_weights_from_checkpoint"
            )
        checkpoint.load_weights(self.net, state["net"], path)
        checkpoint.load_weights(self.ema.net, state["ema"], path)
        try:
            parameters = dict(enumerate(self.net.parameters()))
            if state["optimizer"].keys() != parameters.keys():
                raise ValueError
            for index, moments in state["optimizer"].items():  # Adam would write past the end of smaller tensors
                shapes = {key: moment.shape if key != "step" else moment.numel() for key, moment in moments.items()}
                if shapes != {"step": 1, "exp_avg": parameters[index].shape, "exp_avg_sq": parameters[index].shape}:
                    raise ValueError
                if not all(is_plain(moment) for moment in moments.values()):
                    raise ValueError
            moments = {
                index: {key: moment.clone() for key, moment in entry.items()} for index, entry in state["optimizer"].items()
            }
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            if not all(isinstance(value, int | float) for value in state["scaler"].values()):
                raise ValueError
            if state["scaler"]:  # empty unless the run was in fp16
                self.scaler.load_state_dict(state["scaler"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            raise UserError(f"the optimizer's or the scaler's state in {path} does not fit its network") from None
        self.load_history(state.get("noise_distribution", {}), path)

    def load_history(self, state: object, path: Path) -> None:
        """What the noise distribution had learned, unless the run goes on with one that learns, or learned, nothing."""
        own = self.noise_distribution.state_dict()
        if not isinstance(state, dict):
            raise UserError(f"the noise distribution's state in {path} is damaged")
        if own and state:
            if state.keys() != own.keys() or not all(
                is_plain(state[key]) and state[key].shape == own[key].shape for key in own
            ):
                raise UserError(f"the noise distribution's state in {path} does not fit the config's")
            self.noise_distribution.load_state_dict(state)
