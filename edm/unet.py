"""The raw network F(x; c_noise): a U-Net that knows nothing of diffusion (the paper's Appendix F).

`DDPMpp` is the paper's DDPM++. Parameter names are those of the weights published with the paper.
"""

import math

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import avg_pool2d, dropout, interpolate, scaled_dot_product_attention, silu


def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero biases."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def conv(in_channels: int, out_channels: int, kernel: int, gain: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps height and width, Xavier-uniform weights scaled by `gain`, zero biases."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
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


def positional_embedding(c_noise: torch.Tensor, features: int) -> torch.Tensor:
    """DDPM's sinusoidal embedding: c_noise (B,) -> (B, features), [sin, cos] of frequencies from 1 to 1/10000."""
    k = torch.arange(features // 2, dtype=c_noise.dtype, device=c_noise.device)
    angles = torch.outer(c_noise, 10000 ** (-k / (features // 2 - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """A residual block, with self-attention after it where asked for (Appendix F).

    Args:
        in_channels, out_channels: widths before and after.
        embedding_channels: width of the embedding e.
        resample: "up" doubles the resolution, "down" halves it, None keeps it.
        attention: whether self-attention over the pixels, of one head, follows.
        dropout: probability of dropping a feature before the second convolution.
    """

    skip_scale = math.sqrt(0.5)  # keeps the variance of the sum of the two branches

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
        self.resample = resample
        self.dropout = dropout
        self.norm0 = group_norm(in_channels)
        self.conv0 = conv(in_channels, out_channels, 3)
        self.affine = linear(embedding_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = conv(out_channels, out_channels, 3, gain=1e-5)
        self.skip = conv(in_channels, out_channels, 1) if resample or in_channels != out_channels else nn.Identity()
        self.attention = attention
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = conv(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = conv(out_channels, out_channels, 1, gain=1e-5)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """x (B, C_in, H, W), e (B, embedding_channels) -> (B, C_out, H', W')."""
        h = self.conv0(self.resampled(silu(self.norm0(x))))
        h = silu(self.norm1(h + self.affine(e)[:, :, None, None]))
        h = self.conv1(dropout(h, self.dropout, self.training))
        x = (h + self.skip(self.resampled(x))) * self.skip_scale
        if self.attention:
            x = (x + self.proj(self.attend(self.qkv(self.norm2(x))))) * self.skip_scale
        return x

    def resampled(self, x: torch.Tensor) -> torch.Tensor:
        """DDPM++'s filter [1, 1]: the mean of 2x2 pixels on the way down, their repetition on the way up."""
        if self.resample == "down":
            return avg_pool2d(x, 2)
        return interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    @staticmethod
    def attend(qkv: torch.Tensor) -> torch.Tensor:
        """(B, 3 C, H, W), the roles query, key, value interleaved fastest -> (B, C, H, W)."""
        height = qkv.shape[2]
        query, key, value = rearrange(qkv, "b (c role) h w -> role b 1 (h w) c", role=3)
        return rearrange(scaled_dot_product_attention(query, key, value), "b 1 (h w) c -> b c h w", h=height)


class DDPMpp(nn.Module):
    """The DDPM++ U-Net of the paper (its Appendix F, after Song et al., 2021).

    Args:
        img_resolution: height and width of the images, in pixels.
        img_channels: channels of the input and of the output.
        label_dim: number of classes, 0 for an unconditional network.
        augment_dim: size of the augmentation labels, 0 for none.
        model_channels: the width that `channel_mult` multiplies.
        channel_mult: width of every level over `model_channels`; each level halves the resolution of the one before.
        num_blocks: blocks of a level in the encoder (one more in the decoder).
        attn_resolutions: resolutions whose blocks have self-attention (the lowest level's first decoder block always has it).
        dropout: probability of dropping a feature in each block.

    Raises:
        ValueError: the resolution cannot be halved at every level, or the widths cannot be grouped.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.10,
    ):
        super().__init__()
        lowest = img_resolution >> (len(channel_mult) - 1)
        if lowest << (len(channel_mult) - 1) != img_resolution or lowest < 1:
            raise ValueError(f"{img_resolution} pixels cannot be halved {len(channel_mult) - 1} times, as channel_mult asks")
        self.label_dim = label_dim
        self.augment_dim = augment_dim
        self.model_channels = model_channels
        embedding_channels = 4 * model_channels

        if label_dim:
            self.map_label = linear(label_dim, model_channels)
        if augment_dim:
            self.map_augment = linear(augment_dim, model_channels, bias=False)
        self.map_layer0 = linear(model_channels, embedding_channels)
        self.map_layer1 = linear(embedding_channels, embedding_channels)

        def block(in_channels: int, out_channels: int, **options) -> Block:
            return Block(in_channels, out_channels, embedding_channels, dropout=dropout, **options)

        # Encoder: every output is kept for the decoder.
        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        self.enc = nn.ModuleDict({f"{img_resolution}x{img_resolution}_conv": conv(img_channels, model_channels, 3)})
        width, kept = model_channels, [model_channels]
        for level, (res, channels) in enumerate(levels):
            if level > 0:
                self.enc[f"{res}x{res}_down"] = block(width, width, resample="down")
                kept.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(width, channels, attention=res in attn_resolutions)
                width = channels
                kept.append(width)

        # Decoder: every numbered block first takes in the last kept output.
        self.dec = nn.ModuleDict()
        for level, (res, channels) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, resample="up")
            for index in range(num_blocks + 1):
                attention = index == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{index}"] = block(width + kept.pop(), channels, attention=attention)
                width = channels
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = group_norm(width)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = conv(width, img_channels, 3, gain=1e-5)

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The network's raw output.

        Args:
            x: (B, img_channels, img_resolution, img_resolution), of unit variance.
            c_noise: (B,), the noise conditioning.
            labels: (B, label_dim), one-hot, the zero vector meaning "any class"; None is all zeros.
            augment_labels: (B, augment_dim); None is all zeros.

        Returns:
            (B, img_channels, img_resolution, img_resolution).
        """
        with torch.autocast(x.device.type, enabled=False):  # half precision is too coarse for the noise level
            e = self.embedding(c_noise, labels, augment_labels)
        kept = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, e)
            kept.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = silu(layer(x))
            elif name.endswith("aux_conv"):
                x = layer(x)
            else:
                x = layer(torch.cat([x, kept.pop()], dim=1) if "block" in name else x, e)
        return x

    def embedding(
        self, c_noise: torch.Tensor, labels: torch.Tensor | None, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Noise level and labels as one vector e: (B, 4 model_channels)."""
        e = positional_embedding(c_noise, self.model_channels)
        if self.label_dim:
            if labels is None:
                labels = e.new_zeros(1, self.label_dim)
            e = e + self.map_label(labels.to(e.dtype) * math.sqrt(self.label_dim))
        if self.augment_dim and augment_labels is not None:
            e = e + self.map_augment(augment_labels.to(e.dtype))
        return silu(self.map_layer1(silu(self.map_layer0(e))))


NETWORKS = {"ddpmpp": DDPMpp}
