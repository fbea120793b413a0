"""What the U-Nets are made of: initialisation, embeddings, resampling filters and residual blocks (the paper's Appendix F)."""

import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.nn.functional import conv2d, conv_transpose2d, scaled_dot_product_attention, silu


def xavier(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    """Initialise as DDPM++ and NCSN++ do: Xavier-uniform weights scaled by `gain`, zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def kaiming(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    """Initialise as ADM does: PyTorch's own choice, uniform within 1 / sqrt(fan_in), scaled by `gain`."""
    for parameter in layer.parameters():
        parameter.mul_(gain)
    return layer


def conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation over min(32, channels // 4) groups.

    Raises:
        ValueError: the channels cannot be divided evenly among the groups.
    """
    groups = max(1, min(32, channels // 4))
    if channels % groups:
        raise ValueError(
            f"a layer of {channels} channels cannot be normalised in {groups} equal groups; "
            "choose model_channels and channel_mult so that all widths and their sums are multiples of 32, or of 4 up to 128"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def activate(x: torch.Tensor) -> torch.Tensor:
    """silu(x) of an x that nobody else needs: in its place, unless a gradient will ask for it."""
    return silu(x, inplace=not torch.is_grad_enabled())


def dropout(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Set features of a dense x to 0 with the given probability, and scale up the others so that the mean stays.

    PyTorch's own, but on the CPU, where that draws a number for each feature, one after the other, and takes up to a fifth of a
    training step. There, 16 random bits decide about a feature, so its probability is a multiple of 2^-16 (0.10 is 0.100006).
    """
    if x.device.type != "cpu" or not probability or torch.compiler.is_compiling():
        return functional.dropout(x, probability)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    dropped = min(round(probability * 2**16), 2**16 - 1)
    kept = bits.view(torch.int16).as_strided(x.shape, x.stride()).float().ge_(dropped - 2**15)
    return x * kept.mul_(2**16 / (2**16 - dropped)).to(x.dtype)


def sinusoids(c_noise: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sines and cosines of c_noise (B,) at frequencies (n,): two tensors (B, n)."""
    angles = torch.outer(c_noise, frequencies)
    return angles.sin(), angles.cos()


def falling_frequencies(number: int, steps: int, like: torch.Tensor) -> torch.Tensor:
    """DDPM's frequencies 10000^(-k / steps), k = 0 .. number - 1."""
    return 10000 ** (-torch.arange(number, dtype=like.dtype, device=like.device) / steps)


class FourierFeatures(nn.Module):
    """NCSN++'s embedding of c_noise: (B,) -> (B, features), at random frequencies that are part of the weights."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(features // 2))

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        return torch.cat(sinusoids(c_noise, 2 * math.pi * self.freqs.to(c_noise.dtype)), dim=1)


class Filter(nn.Module):
    """Halves ("down") or doubles ("up") the resolution of every channel with a separable filter of the given taps."""

    def __init__(self, direction: str, taps: tuple[int, ...], padding: int | None = None):
        super().__init__()
        self.direction = direction
        self.padding = (len(taps) - 1) // 2 if padding is None else padding
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        gain = 4 if direction == "up" else 1  # three of four pixels that an up-filter meets are empty
        self.register_buffer("kernel", gain * torch.outer(line, line)[None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        resample = conv2d if self.direction == "down" else conv_transpose2d
        return resample(x, self.kernel.expand(channels, -1, -1, -1), stride=2, padding=self.padding, groups=channels)


def resampler(direction: str | None, taps: tuple[int, ...]) -> nn.Module:
    """`Filter`, in its fastest form: taps (1, 1) are the mean of 2x2 pixels down, and their repetition up."""
    if direction is None:
        return nn.Identity()
    if taps == (1, 1):
        return nn.AvgPool2d(2) if direction == "down" else nn.Upsample(scale_factor=2)
    return Filter(direction, taps)


class Block(nn.Module):
    """DDPM++'s residual block, with self-attention after it where asked for. The attributes say in what the kin differ.

    Args:
        in_channels, out_channels: widths before and after.
        embedding_channels: width of the embedding e.
        resample: "up" doubles the resolution, "down" halves it, None keeps it.
        attention: whether self-attention over the pixels follows.
        dropout: probability of dropping a feature before the second convolution.

    Raises:
        ValueError: the widths cannot be divided into equal groups or heads.
    """

    eps = 1e-6
    skip_scale = math.sqrt(0.5)  # keeps the variance of the sum of the two branches
    taps = (1, 1)  # of the filter that resamples
    weighted_resampling = True  # whether the skip path has a 1x1 convolution wherever it resamples
    scale_shift = False  # whether the embedding scales as well as shifts
    channels_per_head = None  # of the attention; None for a single head
    init = staticmethod(xavier)
    qkv_gain, last_gain = math.sqrt(0.2), 1e-5

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
        weighted = in_channels != out_channels or (resample and self.weighted_resampling)
        self.skip = init(conv(in_channels, out_channels, 1)) if weighted else nn.Identity()
        self.heads = 0
        if attention:
            self.heads = max(1, out_channels // (self.channels_per_head or out_channels))
            if out_channels % self.heads:
                raise ValueError(f"attention over {out_channels} channels cannot be divided among {self.heads} equal heads")
            self.norm2 = group_norm(out_channels, self.eps)
            self.qkv = init(conv(out_channels, 3 * out_channels, 1), self.qkv_gain)
            self.proj = init(conv(out_channels, out_channels, 1), self.last_gain)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """x (B, C_in, H, W), e (B, embedding_channels) -> (B, C_out, H', W')."""
        h = self.conv0(self.resample(activate(self.norm0(x))))
        e = self.affine(e)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = activate(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = activate(self.norm1(h.add_(e)))
        if self.training:
            h = dropout(h, self.dropout)
        x = self.joined(self.conv1(h), self.skip(self.resample(x)))
        if self.heads:
            x = self.joined(self.proj(self.attend(self.qkv(self.norm2(x)))), x)
        return x

    def joined(self, h: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """(h + skip) skip_scale, in the place of h, which nobody else has."""
        h.add_(skip)
        return h if self.skip_scale == 1 else h.mul_(self.skip_scale)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """(B, 3 C, H, W), heads in blocks, the roles query, key, value interleaved fastest -> (B, C, H, W)."""
        height = qkv.shape[2]
        roles = rearrange(qkv, "b (heads c role) h w -> role b heads (h w) c", heads=self.heads, role=3)
        q, k, v = roles.contiguous()  # PyTorch's fast kernels, a T4's too, want the features of a pixel side by side
        return rearrange(scaled_dot_product_attention(q, k, v), "b heads (h w) c -> b (heads c) h w", h=height)


class NCSNppBlock(Block):
    """NCSN++'s residual block: DDPM++'s, with a smoother filter."""

    taps = (1, 3, 3, 1)


class ADMBlock(Block):
    """ADM's residual block (Dhariwal and Nichol, 2021)."""

    eps = 1e-5
    skip_scale = 1.0
    weighted_resampling = False
    scale_shift = True
    channels_per_head = 64
    init = staticmethod(kaiming)
    qkv_gain, last_gain = 1.0, 0.0


class AuxResidual(nn.Conv2d):
    """A step of NCSN++'s residual input pyramid: a 3x3 convolution, then the filter, halving the resolution."""

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[int, ...]):
        super().__init__(in_channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.down = Filter("down", taps, padding=0)  # the convolution has padded for both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(super().forward(x))
