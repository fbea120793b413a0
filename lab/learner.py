"""What a training step changes and a checkpoint holds: the network, its average, and the optimizer."""

from pathlib import Path

import torch

from edm.ema import EMA
from lab import checkpoint
from lab.build import build_network, build_noise_distribution
from lab.checkpoint import is_plain
from lab.cli import UserError
from lab.config import Config
from lab.device import autocast_dtype
from lab.seeds import seed_for


class Learner:
    """The state of a training run, on one device.

    Args:
        config: the run; `preconditioning.sigma_data` is a number.
        device: where everything lives.

    Attributes:
        net: the denoiser in training.
        ema: its averaged weights; `ema.net` is the denoiser that samples are made with.
        noise_distribution: the distribution of the noise levels.
        precision: that of the network's matrix products.
        scaler: scales fp16 losses, so that small gradients do not vanish; disabled in other precisions.
    """

    def __init__(self, config: Config, device: torch.device):
        training = config.training
        torch.manual_seed(seed_for(training.seed, "initial weights"))
        # Channels last is the layout in which convolutions are fastest.
        self.net = build_network(config).to(device, memory_format=torch.channels_last).train()
        self.config = config
        self.precision = autocast_dtype(training.mixed_precision, device)
        self.ema = EMA(self.net, config.ema.halflife_images, config.ema.rampup_ratio)
        self.optimizer = torch.optim.Adam(
            self.net.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=device.type != "mps",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.noise_distribution = build_noise_distribution(config)
        if isinstance(self.noise_distribution, torch.nn.Module):
            self.noise_distribution.to(device)
        if training.compile:
            self.net.model.compile(dynamic=False)

    def optimizer_step(self, images_seen: int) -> None:
        """Update the weights by Adam from the gradients in `net`, then clear the gradients.

        Gradients that are not finite are replaced first (nan by 0, infinity by 1e5); then all are clipped to `max_grad_norm`.

        Args:
            images_seen: images of the whole run so far, this step's included. The learning rate rises with them at first.
        """
        training, parameters = self.config.training, list(self.net.parameters())
        self.scaler.unscale_(self.optimizer)  # notes overflows, so it comes before they are replaced
        for parameter in parameters:
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        learning_rate = training.learning_rate * min(images_seen / max(training.lr_rampup_images, 1), 1)
        if training.lr_halflife_images is not None:
            learning_rate *= 0.5 ** (images_seen / training.lr_halflife_images)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Return the state for a checkpoint. The tensors are the live ones, not copies."""
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.net.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],  # its settings are the config's
            "scaler": self.scaler.state_dict(),
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
        try:
            moments = {i: like_parameter(state["optimizer"][i], p) for i, p in enumerate(self.net.parameters())}
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            if not all(isinstance(value, int | float) for value in state["scaler"].values()):
                raise ValueError
            if state["scaler"]:  # empty unless the run was in fp16
                self.scaler.load_state_dict(state["scaler"])
            learned, own = state.get("noise_distribution", {}), self.noise_distribution.state_dict()
            if own and learned:  # otherwise the distribution has changed, and starts without a history
                if not all(is_plain(learned[key]) and learned[key].shape == own[key].shape for key in own):
                    raise ValueError
                self.noise_distribution.load_state_dict(learned)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            raise UserError(f"the state of the optimizer in {path} is damaged, or belongs to another network") from None


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
