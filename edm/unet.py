"""The raw network F(x; c_noise): U-Nets that know nothing of diffusion (the paper's Appendix F).

`DDPMpp` and `NCSNpp` follow Song et al. (2021), `ADM` Dhariwal and Nichol (2021). Parameter names are those of the weights
published with the paper.
"""

import math

import torch
from torch import nn
from torch.nn.functional import silu

from edm.blocks import (
    ADMBlock,
    AuxResidual,
    Block,
    FourierFeatures,
    NCSNppBlock,
    conv,
    falling_frequencies,
    group_norm,
    sinusoids,
)


class UNet(nn.Module):
    """What the three have in common: an encoder and a decoder over named blocks.

    Args:
        img_resolution: height and width of the images, in pixels.
        img_channels: channels of the input.
        out_channels: channels of the output; by default those of the input.
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

    Block = Block
    noise_mult = 1  # features of the noise embedding over model_channels

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        out_channels: int | None = None,
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
        self.embedding_channels = 4 * model_channels
        self.add_mapping()

        def block(in_channels: int, out_channels: int, **options) -> Block:
            return self.Block(in_channels, out_channels, self.embedding_channels, dropout=dropout, **options)

        # Encoder: every output is kept for the decoder.
        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        width = self.stem_channels(channel_mult)
        self.enc = nn.ModuleDict({f"{img_resolution}x{img_resolution}_conv": self.Block.init(conv(img_channels, width, 3))})
        kept, aux_channels = [width], img_channels
        for level, (res, channels) in enumerate(levels):
            if level > 0:
                self.enc[f"{res}x{res}_down"] = block(width, width, resample="down")
                aux_channels = self.add_aux(f"{res}x{res}_aux_residual", aux_channels, width)
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
                attention = res in attn_resolutions and self.decoder_attends(last=index == num_blocks)
                self.dec[f"{res}x{res}_block{index}"] = block(width + kept.pop(), channels, attention=attention)
                width = channels
        self.add_output(img_resolution, width, out_channels or img_channels)

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
            (B, out_channels, img_resolution, img_resolution).
        """
        with torch.autocast(x.device.type, enabled=False):  # half precision is too coarse for the noise level
            if labels is None:
                labels = c_noise.new_zeros(1, self.label_dim)
            if augment_labels is None:
                augment_labels = c_noise.new_zeros(1, self.augment_dim)
            e = self.embedding(c_noise, labels.to(c_noise.dtype), augment_labels.to(c_noise.dtype))
        aux, kept = x, []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = aux = (kept.pop() + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x) if name.endswith("conv") else layer(x, e)
            kept.append(x)
        for name, layer in self.dec.items():
            if "aux" not in name:
                x = layer(torch.cat([x, kept.pop()], dim=1) if "block" in name else x, e)
        return self.output(x)

    def stem_channels(self, channel_mult: tuple[int, ...]) -> int:
        """Width of the first convolution."""
        return self.model_channels

    def add_aux(self, name: str, aux_channels: int, channels: int) -> int:
        """Add a step of the input pyramid, if there is one; returns the pyramid's width after it."""
        return aux_channels

    def decoder_attends(self, last: bool) -> bool:
        """Whether a decoder block has self-attention at the resolutions that ask for it."""
        return last


class DDPMpp(UNet):
    """DDPM++."""

    def add_mapping(self) -> None:
        """Layers from noise level and labels to the embedding."""
        init, features = self.Block.init, self.noise_mult * self.model_channels
        if self.label_dim:
            self.map_label = init(nn.Linear(self.label_dim, features))
        if self.augment_dim:
            self.map_augment = init(nn.Linear(self.augment_dim, features, bias=False))
        self.map_layer0 = init(nn.Linear(features, self.embedding_channels))
        self.map_layer1 = init(nn.Linear(self.embedding_channels, self.embedding_channels))

    def noise_features(self, c_noise: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, model_channels), frequencies from 1 to 1/10000."""
        half = self.model_channels // 2
        return torch.cat(sinusoids(c_noise, falling_frequencies(half, half - 1, like=c_noise)), dim=1)

    def embedding(self, c_noise: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor) -> torch.Tensor:
        """Noise level and labels as one vector e: (B, embedding_channels)."""
        e = self.noise_features(c_noise)
        if self.label_dim:
            e = e + self.map_label(labels * math.sqrt(self.label_dim))
        if self.augment_dim:
            e = e + self.map_augment(augment_labels)
        return silu(self.map_layer1(silu(self.map_layer0(e))))

    def add_output(self, img_resolution: int, channels: int, out_channels: int) -> None:
        """Layers from the decoder's last block to the output."""
        name = f"{img_resolution}x{img_resolution}_aux"
        self.dec[f"{name}_norm"] = group_norm(channels, self.Block.eps)
        self.dec[f"{name}_conv"] = self.Block.init(conv(channels, out_channels, 3), self.Block.last_gain)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        *_, norm, last = self.dec.values()
        return last(silu(norm(x)))


class NCSNpp(DDPMpp):
    """NCSN++: DDPM++ with Fourier features, a smoother filter, and the input fed to every level of the encoder."""

    Block = NCSNppBlock
    noise_mult = 2

    def add_mapping(self) -> None:
        self.map_noise = FourierFeatures(self.noise_mult * self.model_channels)
        super().add_mapping()

    def noise_features(self, c_noise: torch.Tensor) -> torch.Tensor:
        return self.map_noise(c_noise)

    def add_aux(self, name: str, aux_channels: int, channels: int) -> int:
        self.enc[name] = self.Block.init(AuxResidual(aux_channels, channels, self.Block.taps))
        return channels


class ADM(UNet):
    """ADM, the network of guided diffusion."""

    Block = ADMBlock

    def add_mapping(self) -> None:
        """Layers from noise level and labels to the embedding."""
        init, features = self.Block.init, self.model_channels
        if self.augment_dim:
            self.map_augment = init(nn.Linear(self.augment_dim, features, bias=False), gain=0)
        self.map_layer0 = init(nn.Linear(features, self.embedding_channels))
        self.map_layer1 = init(nn.Linear(self.embedding_channels, self.embedding_channels))
        if self.label_dim:
            self.map_label = nn.Linear(self.label_dim, self.embedding_channels, bias=False)
            nn.init.normal_(self.map_label.weight)

    def embedding(self, c_noise: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor) -> torch.Tensor:
        """Noise level and labels as one vector e: (B, embedding_channels)."""
        half = self.model_channels // 2
        sines, cosines = sinusoids(c_noise, falling_frequencies(half, half, like=c_noise))
        e = torch.cat([cosines, sines], dim=1)
        if self.augment_dim:
            e = e + self.map_augment(augment_labels)
        e = self.map_layer1(silu(self.map_layer0(e)))
        return silu(e + self.map_label(labels)) if self.label_dim else silu(e)

    def stem_channels(self, channel_mult: tuple[int, ...]) -> int:
        return self.model_channels * channel_mult[0]

    def decoder_attends(self, last: bool) -> bool:
        return True

    def add_output(self, img_resolution: int, channels: int, out_channels: int) -> None:
        """Layers from the decoder's last block to the output."""
        self.out_norm = group_norm(channels, self.Block.eps)
        self.out_conv = self.Block.init(conv(channels, out_channels, 3), self.Block.last_gain)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_conv(silu(self.out_norm(x)))


NETWORKS = {"ddpmpp": DDPMpp, "ncsnpp": NCSNpp, "adm": ADM}
