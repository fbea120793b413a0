"""The parts of the U-Nets: initialization, noise embeddings, resampling filters and residual blocks (Appendix F).

The paper gives the outline. What it leaves out follows the networks published with it, so that their weights load as they are
and give the same numbers: the names of the parameters, the order of the channels of `qkv` (query, key and value of a feature
are neighbours), the gains of the initial weights, and the number of groups and eps of the normalizations.
"""

import math

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, dropout, scaled_dot_product_attention, silu


def xavier_init(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    """Initialize a layer of DDPM++ or NCSN++: Xavier-uniform weights times `gain`, zero biases. Returns the layer."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def default_init(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    """Initialize a new layer of ADM: PyTorch's default, uniform within 1 / sqrt(fan_in), times `gain`. Returns the layer."""
    for parameter in layer.parameters():
        parameter.mul_(gain)
    return layer


def conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """Return a convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


class GroupNorm(nn.GroupNorm):
    """Group normalization that returns the dtype and the memory layout of its input.

    PyTorch's does not on a GPU: autocast runs it in float32, and its kernel copies channels-last features to another layout.
    The layers after it would then move twice the bytes, and the next convolution would copy them back. The statistics are
    float32 inside the kernel in either case.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            x = nn.functional.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return x.contiguous(memory_format=torch.channels_last) if is_channels_last else x


def group_norm(channels: int, eps: float) -> GroupNorm:
    """Return a group normalization with min(32, channels // 4) groups.

    Raises:
        ValueError: the channels cannot be divided into equal groups.
    """
    groups = max(1, min(32, channels // 4))
    if channels % groups:
        raise ValueError(
            f"a layer of {channels} channels cannot be normalised in {groups} equal groups; "
            "choose model_channels and channel_mult so that all widths and their sums are multiples of 32, or of 4 up to 128"
        )
    return GroupNorm(groups, channels, eps=eps)


class SinusoidalEmbedding(nn.Module):
    """The noise embedding of DDPM++: sines and cosines of c_noise, frequencies from 1 to 1/10000, (B,) -> (B, num_features)."""

    def __init__(self, num_features: int):
        super().__init__()
        self.half = num_features // 2

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        k = torch.arange(self.half, dtype=c_noise.dtype, device=c_noise.device)
        angles = torch.outer(c_noise, 10000 ** (-k / (self.half - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ADMSinusoidalEmbedding(SinusoidalEmbedding):
    """The noise embedding of ADM: like that of DDPM++, but cosines first, and the lowest frequency is above 1/10000."""

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        k = torch.arange(self.half, dtype=c_noise.dtype, device=c_noise.device)
        angles = torch.outer(c_noise, 10000 ** (-k / self.half))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """The noise embedding of NCSN++: sines and cosines of c_noise at random frequencies, (B,) -> (B, num_features)."""

    def __init__(self, num_features: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(num_features // 2))

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(c_noise, 2 * math.pi * self.freqs.to(c_noise.dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Filter(nn.Module):
    """Halves ("down") or doubles ("up") the resolution with a separable filter, applied to each channel alone.

    Args:
        direction: "down" or "up".
        taps: the filter along one axis, before it is scaled so that the image keeps its mean.
        padding: pixels of zeros around the image; by default those that make the resolution exactly half or double.
    """

    def __init__(self, direction: str, taps: tuple[int, ...], padding: int | None = None):
        super().__init__()
        self.resample = conv2d if direction == "down" else conv_transpose2d
        self.padding = (len(taps) - 1) // 2 if padding is None else padding
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        gain = 4 if direction == "up" else 1  # a transposed convolution of stride 2 spreads one pixel over four
        self.register_buffer("kernel", gain * torch.outer(line, line)[None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to (B, C, H / 2, W / 2) or (B, C, 2 H, 2 W)."""
        channels = x.shape[1]
        return self.resample(x, self.kernel.expand(channels, -1, -1, -1), stride=2, padding=self.padding, groups=channels)


def resampler(direction: str | None, taps: tuple[int, ...]) -> nn.Module:
    """Return the module that resamples "up", "down" or, for None, not at all; for taps (1, 1), a faster one than `Filter`."""
    if direction is None:
        return nn.Identity()
    if taps == (1, 1):
        return nn.AvgPool2d(2) if direction == "down" else nn.Upsample(scale_factor=2)
    return Filter(direction, taps)


class Block(nn.Module):
    """The residual block of DDPM++, optionally followed by self-attention. NCSN++ and ADM change the class attributes.

    Args:
        in_channels, out_channels: width before and after.
        embedding_channels: width of the embedding e.
        resample: "up" doubles the resolution, "down" halves it, None keeps it.
        attention: whether self-attention over the pixels follows.
        dropout: probability of zeroing a feature before the second convolution.

    Raises:
        ValueError: the widths cannot be divided into equal groups or heads.
    """

    eps = 1e-6  # of the group normalization
    skip_scale = math.sqrt(0.5)  # keeps the variance of the sum of two branches
    taps = (1, 1)  # of the resampling filter
    skip_conv_where_resampled = True  # a 1x1 convolution on the skip branch wherever the resolution changes
    scale_shift = False  # whether the embedding scales the features as well as shifting them
    channels_per_head = None  # of the attention; None for a single head
    init = staticmethod(xavier_init)
    qkv_gain, last_gain = math.sqrt(0.2), 1e-5  # last_gain: of the last convolution of each branch, so that it starts near 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        resample: str | None = None,
        attention: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        init = self.init
        self.dropout = dropout
        self.resample = resampler(resample, self.taps)
        self.norm0 = group_norm(in_channels, self.eps)
        self.conv0 = init(conv(in_channels, out_channels, 3))
        self.affine = init(nn.Linear(embedding_channels, (2 if self.scale_shift else 1) * out_channels))
        self.norm1 = group_norm(out_channels, self.eps)
        self.conv1 = init(conv(out_channels, out_channels, 3), self.last_gain)
        skip_conv = in_channels != out_channels or (resample and self.skip_conv_where_resampled)
        self.skip = init(conv(in_channels, out_channels, 1)) if skip_conv else nn.Identity()
        self.heads = max(1, out_channels // (self.channels_per_head or out_channels)) if attention else 0
        if attention:
            if out_channels % self.heads:
                raise ValueError(f"attention over {out_channels} channels cannot be divided among {self.heads} equal heads")
            self.norm2 = group_norm(out_channels, self.eps)
            self.qkv = init(conv(out_channels, 3 * out_channels, 1), self.qkv_gain)
            self.proj = init(conv(out_channels, out_channels, 1), self.last_gain)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Map x (B, in_channels, H, W) and the embedding e (B, embedding_channels) to (B, out_channels, H', W')."""
        h = self.conv0(self.resample(silu(self.norm0(x))))
        e = self.affine(e)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)  # shift + norm1(h) (scale + 1)
        else:
            h = self.norm1(h + e)
        h = self.conv1(dropout(silu(h), self.dropout, self.training))
        x = (h + self.skip(self.resample(x))) * self.skip_scale
        if self.heads:
            x = (self.proj(self.attend(self.qkv(self.norm2(x)))) + x) * self.skip_scale
        return x

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Apply self-attention over the pixels: qkv (B, 3 C, H, W) to (B, C, H, W).

        The channels of `qkv` are ordered by head, then by feature, then query, key, value.
        """
        height = qkv.shape[2]
        qkv = rearrange(qkv, "b (heads c role) h w -> role b heads (h w) c", heads=self.heads, role=3)
        q, k, v = qkv.contiguous()  # PyTorch's fast kernels need the features of a pixel next to each other in memory
        return rearrange(scaled_dot_product_attention(q, k, v), "b heads (h w) c -> b (heads c) h w", h=height)


class NCSNppBlock(Block):
    """The residual block of NCSN++: that of DDPM++ with a smoother resampling filter."""

    taps = (1, 3, 3, 1)


class ADMBlock(Block):
    """The residual block of ADM (Dhariwal and Nichol, 2021)."""

    eps = 1e-5
    skip_scale = 1.0
    skip_conv_where_resampled = False
    scale_shift = True
    channels_per_head = 64
    init = staticmethod(default_init)
    qkv_gain, last_gain = 1.0, 0.0


class AuxResidual(nn.Conv2d):
    """A level of NCSN++'s input pyramid: a 3x3 convolution, then the filter that halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[int, ...]):
        super().__init__(in_channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.down = Filter("down", taps, padding=0)  # the convolution has padded for both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, in_channels, H, W) to (B, out_channels, H / 2, W / 2)."""
        return self.down(super().forward(x))
