"""The raw network F(x; c_noise): the U-Nets DDPM++ and NCSN++ of Song et al. (2021) and ADM of Dhariwal and Nichol (2021).

They are plain networks from images to images, which `edm.precond` turns into denoisers. As `blocks.py` says, what the paper
leaves out follows the networks published with it; here the order of concatenated features, the scaling of the labels, and where
the decoder has attention.
"""

import math

import torch
from torch import nn
from torch.nn.functional import silu

from edm import blocks


class UNet(nn.Module):
    """The base of the three networks: an encoder, a decoder, and skip connections between them.

    DDPM++, NCSN++ and ADM set the class attributes and define the embedding: `add_embedding_layers` adds its layers, and
    `embedding` maps noise features (B, num_features), labels and augmentation labels to it, e (B, embedding_channels).

    Args:
        img_resolution: height and width of the images, in pixels.
        img_channels: channels of the input.
        out_channels: channels of the output; by default as many as `img_channels`.
        label_dim: number of classes, 0 for an unconditional network.
        augment_dim: size of the augmentation labels, 0 for none.
        model_channels: the base width.
        channel_mult: width of each level, in multiples of `model_channels`. Each level halves the resolution.
        num_blocks: blocks in each level of the encoder (the decoder has one more).
        attn_resolutions: resolutions at which blocks have self-attention (the decoder's first block always has it).
        dropout: probability of zeroing a feature in each block.

    Raises:
        ValueError: the resolution cannot be halved at every level, or the widths cannot be divided into groups or heads.
    """

    Block = blocks.Block
    NoiseEmbedding = blocks.SinusoidalEmbedding
    noise_mult = 1  # features of the noise embedding, in multiples of model_channels
    wide_stem = False  # whether the first convolution has the width of the first level instead of model_channels
    input_pyramid = False  # whether the input, downsampled, is added at each level of the encoder
    full_decoder_attention = False  # whether all decoder blocks at attn_resolutions have attention or only the last
    separate_output = False  # whether the output layers are named out_norm and out_conv instead of being part of dec

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
        halvings = len(channel_mult) - 1
        if img_resolution % 2**halvings:
            raise ValueError(f"{img_resolution} pixels cannot be halved {halvings} times, as channel_mult asks")
        self.label_dim, self.augment_dim = label_dim, augment_dim
        num_features, embedding_channels = self.noise_mult * model_channels, 4 * model_channels
        self.map_noise = self.NoiseEmbedding(num_features)
        self.add_embedding_layers(num_features, embedding_channels)

        def block(in_channels: int, out_channels: int, **options) -> blocks.Block:
            return self.Block(in_channels, out_channels, embedding_channels, dropout=dropout, **options)

        # Encoder. Each of its outputs is concatenated to the input of a decoder block, the last one first.
        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        top, init = f"{img_resolution}x{img_resolution}", self.Block.init
        width = model_channels * (channel_mult[0] if self.wide_stem else 1)
        self.enc = nn.ModuleDict({f"{top}_conv": init(blocks.conv(img_channels, width, 3))})
        skip_widths, aux_width = [width], img_channels
        for level, (res, channels) in enumerate(levels):
            if level > 0:
                self.enc[f"{res}x{res}_down"] = block(width, width, resample="down")
                if self.input_pyramid:
                    self.enc[f"{res}x{res}_aux_residual"] = init(blocks.AuxResidual(aux_width, width, self.Block.taps))
                    aux_width = width
                skip_widths.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(width, channels, attention=res in attn_resolutions)
                width = channels
                skip_widths.append(width)

        self.dec = nn.ModuleDict()
        for level, (res, channels) in reversed(list(enumerate(levels))):
            if level == halvings:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, resample="up")
            for index in range(num_blocks + 1):
                attention = res in attn_resolutions and (self.full_decoder_attention or index == num_blocks)
                self.dec[f"{res}x{res}_block{index}"] = block(width + skip_widths.pop(), channels, attention=attention)
                width = channels

        norm = blocks.group_norm(width, self.Block.eps)
        last = init(blocks.conv(width, out_channels or img_channels, 3), self.Block.last_gain)
        if self.separate_output:
            self.out_norm, self.out_conv = norm, last
        else:
            self.dec[f"{top}_aux_norm"], self.dec[f"{top}_aux_conv"] = norm, last

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the raw output of the network.

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
            e = self.embedding(self.map_noise(c_noise), labels.to(c_noise.dtype), augment_labels.to(c_noise.dtype))
        aux, skips = x, []
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = aux = (skips.pop() + layer(aux)) / math.sqrt(2)  # replaces the output of the block before it
            else:
                x = layer(x) if name.endswith("conv") else layer(x, e)
            skips.append(x)
        for name, layer in self.dec.items():
            if "aux" not in name:  # the output layers of DDPM++ and NCSN++
                x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, e)
        norm, last = (self.out_norm, self.out_conv) if self.separate_output else list(self.dec.values())[-2:]
        return last(silu(norm(x)))


class DDPMpp(UNet):
    """The DDPM++ network (Song et al., 2021)."""

    def add_embedding_layers(self, num_features: int, embedding_channels: int) -> None:
        init = self.Block.init
        if self.label_dim:
            self.map_label = init(nn.Linear(self.label_dim, num_features))
        if self.augment_dim:
            self.map_augment = init(nn.Linear(self.augment_dim, num_features, bias=False))
        self.map_layer0 = init(nn.Linear(num_features, embedding_channels))
        self.map_layer1 = init(nn.Linear(embedding_channels, embedding_channels))

    def embedding(self, features: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor) -> torch.Tensor:
        if self.label_dim:
            features = features + self.map_label(labels * math.sqrt(self.label_dim))
        if self.augment_dim:
            features = features + self.map_augment(augment_labels)
        return silu(self.map_layer1(silu(self.map_layer0(features))))


class NCSNpp(DDPMpp):
    """The NCSN++ network: DDPM++ with Fourier features, a smoother resampling filter and the input added at every level."""

    Block = blocks.NCSNppBlock
    NoiseEmbedding = blocks.FourierEmbedding
    noise_mult = 2
    input_pyramid = True


class ADM(UNet):
    """The ADM network (Dhariwal and Nichol, 2021)."""

    Block = blocks.ADMBlock
    NoiseEmbedding = blocks.ADMSinusoidalEmbedding
    wide_stem = True
    full_decoder_attention = True
    separate_output = True

    def add_embedding_layers(self, num_features: int, embedding_channels: int) -> None:
        init = self.Block.init
        if self.augment_dim:
            self.map_augment = init(nn.Linear(self.augment_dim, num_features, bias=False), gain=0)
        self.map_layer0 = init(nn.Linear(num_features, embedding_channels))
        self.map_layer1 = init(nn.Linear(embedding_channels, embedding_channels))
        if self.label_dim:
            self.map_label = nn.Linear(self.label_dim, embedding_channels, bias=False)
            nn.init.normal_(self.map_label.weight)

    def embedding(self, features: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor) -> torch.Tensor:
        if self.augment_dim:
            features = features + self.map_augment(augment_labels)
        e = self.map_layer1(silu(self.map_layer0(features)))
        if self.label_dim:
            e = e + self.map_label(labels)
        return silu(e)


NETWORKS = {"ddpmpp": DDPMpp, "ncsnpp": NCSNpp, "adm": ADM}
