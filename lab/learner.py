"""What a training step changes and a checkpoint holds: the network, its average, and the optimizer."""

import math
from pathlib import Path

import torch

from edm.ema import EMA, PowerEMA
from edm.precond import PreconditionedDenoiser
from lab import checkpoint
from lab.build import build_network, build_noise_distribution
from lab.checkpoint import WIDTHS, is_plain
from lab.cli import UserError
from lab.config import Config
from lab.device import autocast, autocast_dtype
from lab.distributed import World
from lab.seeds import seed_for


class Learner:
    """The state of a training run, on one device.

    Args:
        config: the run; `preconditioning.sigma_data` is a number.
        device: where everything lives.
        world: the ranks that train together, which agree on one precision; by default there is only this one.

    Attributes:
        net: the denoiser in training.
        ema: its averaged weights; `ema.net` is the denoiser that samples are made with.
        power_ema: {width: average} for snapshots; empty without `ema.snapshot_every_n`.
        noise_distribution: the distribution of the noise levels.
        precision: that of the network's matrix products.
        scaler: skips steps with gradients that are not finite. In fp16 it also scales the loss, so that small gradients do
            not vanish.
        is_compiled: whether the network is compiled.
    """

    def __init__(self, config: Config, device: torch.device, world: World | None = None):
        training = config.training
        torch.manual_seed(seed_for(training.seed, "initial weights"))
        # The shapes are the same in every step, so a GPU may try all algorithms once, and take the fastest.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
        # Channels last is the layout in which convolutions are fastest.
        self.net = build_network(config).to(device, memory_format=torch.channels_last).train()
        self.config = config
        world = world or World()
        self.precision = world.common_precision(autocast_dtype(training.mixed_precision, device))
        self.ema = EMA(self.net, config.ema.halflife_images, config.ema.rampup_ratio)
        self.power_ema = {width: PowerEMA(self.net, width) for width in WIDTHS if config.ema.snapshot_every_n}
        self.optimizer = torch.optim.Adam(
            self.net.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=device.type != "mps",
        )
        self.scales_loss = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, 2.0**16 if self.scales_loss else 1.0, enabled=device.type != "mps")
        self.noise_distribution = build_noise_distribution(config)
        if isinstance(self.noise_distribution, torch.nn.Module):
            self.noise_distribution.to(device)
        self.is_compiled = training.compile and compile_network(self.net, config, device, self.precision, world)

    def optimizer_step(self, images_seen: int) -> None:
        """Update the weights by Adam from the gradients in `net`, clipped to `max_grad_norm`; then clear the gradients.

        If any gradient is not finite, the weights stay as they are. (On Apple's GPUs this is not checked.)

        Args:
            images_seen: images of the whole run so far, this step's included. The learning rate rises with them at first.
        """
        training, parameters = self.config.training, list(self.net.parameters())
        self.scaler.unscale_(self.optimizer)  # and notes on the device whether all gradients are finite
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        learning_rate = training.learning_rate * min(images_seen / max(training.lr_rampup_images, 1), 1)
        if training.lr_halflife_images is not None:
            learning_rate *= 0.5 ** (images_seen / training.lr_halflife_images)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.scales_loss else 1.0)
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Return the state for a checkpoint. The tensors are the live ones, not copies."""
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "power_ema": {width: average.net.state_dict() for width, average in self.power_ema.items()},
            "optimizer": self.optimizer.state_dict()["state"],  # its settings are the config's
            "scaler": self.scaler.state_dict() if self.scales_loss else {},
            "noise_distribution": self.noise_distribution.state_dict(),
        }

    def load_weights(self, weights: dict, path: str | Path) -> None:
        """Start from weights read from `path`, in the network and in its average.

        Raises:
            UserError: they belong to another architecture.
        """
        for net in (self.net, self.ema.net):
            checkpoint.load_weights(net, weights, path)

    def load_state_dict(self, state: dict, path: str | Path) -> None:
        """Restore what `state_dict` returned, read from `path`.

        Raises:
            UserError: it belongs to another network, is damaged, or holds weights alone.
        """
        if not {"net", "optimizer", "scaler"} <= state.keys():
            raise UserError(
                f"{path} holds weights alone, so no run can go on from it; use --load_model_weights_from_checkpoint"
            )
        checkpoint.load_weights(self.net, state["net"], path)
        checkpoint.load_weights(self.ema.net, state["ema"], path)
        for width, average in self.power_ema.items():  # without saved averages, both start from the current weights
            checkpoint.load_weights(average.net, state.get("power_ema", {}).get(width, state["net"]), path)
        try:
            moments = {i: like_parameter(state["optimizer"][i], p) for i, p in enumerate(self.net.parameters())}
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in state["scaler"].values()):
                raise ValueError
            if state["scaler"] and self.scales_loss:  # it is empty unless the run was in fp16
                self.scaler.load_state_dict(state["scaler"])
            learned, own = state.get("noise_distribution", {}), self.noise_distribution.state_dict()
            if own and learned:  # otherwise the distribution has changed, and starts without a history
                if not all(is_plain(learned[key]) and learned[key].shape == own[key].shape for key in own):
                    raise ValueError
                self.noise_distribution.load_state_dict(learned)
        except Exception:  # odd values can make PyTorch raise anything
            raise UserError(f"the state of the optimizer in {path} is damaged, or belongs to another network") from None


def compile_network(
    net: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, world: World
) -> bool:
    """Compile the network with torch.compile, unless that changes what it computes. Returns whether it is compiled.

    D and its gradients with respect to the weights are computed with and without, without dropout. Their difference, relative
    to their norm, may be twice the error that `autocast` documents. The weights are random meanwhile, because the initial ones
    make D almost independent of most layers.
    """
    shard, size = world.shard(config.training.batch_size), config.data.resolution
    batch_size = math.ceil((shard.stop - shard.start) / config.training.accumulation)
    generator, network, weights = torch.Generator().manual_seed(0), config.network, list(net.parameters())
    x = torch.randn(batch_size, config.data.channels, size, size, generator=generator)
    x = x.to(device, memory_format=torch.channels_last)
    sigma = torch.linspace(0.1, 10, batch_size, device=device)
    labels = torch.zeros(batch_size, network.label_dim, device=device) if network.label_dim else None
    augment_labels = torch.zeros(batch_size, network.augment_dim, device=device) if network.augment_dim else None

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(device, precision):
            D = net(x, sigma, labels, augment_labels)
        gradients = torch.autograd.grad(D.square().sum() / batch_size, weights)
        return D.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    initial = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    net.eval()
    eager = compute()
    net.model.compile(dynamic=False)
    differences = [((one - other).norm() / other.norm()).item() for one, other in zip(compute(), eager)]
    net.train()
    with torch.no_grad():
        for weight, value in zip(weights, initial):
            weight.copy_(value)
    limit = {torch.float32: 1e-3, torch.float16: 0.06, torch.bfloat16: 0.24}[precision]
    if world.all_reduce_max(not all(difference < limit for difference in differences)):  # nan is not below it
        torch.compiler.set_stance("force_eager")
        D, gradients = differences
        print(f"The network is not compiled: torch.compile changes D by {D:.1%} and its gradients by {gradients:.1%}")
        return False
    return True


def like_parameter(moments: dict, parameter: torch.Tensor) -> dict:
    """Return Adam's moments of a parameter in the parameter's memory layout, which its fused kernels rely on.

    Raises:
        ValueError: they are not those of a parameter of this shape.
    """
    shapes = {key: moment.shape if key != "step" else moment.numel() for key, moment in moments.items()}
    if shapes != {"step": 1, "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
        raise ValueError
    if not all(is_plain(moment) for moment in moments.values()):
        raise ValueError
    averages = {key: torch.empty_like(parameter).copy_(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": moments["step"], **averages}
