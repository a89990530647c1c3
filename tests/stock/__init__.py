"""Modules built like those that users have: the structure and names of the originals, no more."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


class SeedProjector(nn.Module):
    """As DeCo's: pooling, then an MLP."""

    def __init__(self, layers=2, side=3, channels=8, features=12):
        super().__init__()
        self.sampler = nn.AdaptiveAvgPool2d(side)
        more = [m for _ in range(layers - 1) for m in (nn.GELU(), nn.Linear(features, features))]
        self.mlp_projector = nn.Sequential(nn.Linear(channels, features), *more)

    def forward(self, x):
        side = math.isqrt(x.shape[1])
        pooled = self.sampler(x.mT.unflatten(2, (side, side)))
        return self.mlp_projector(pooled.flatten(2).mT)


class RatioPooling(nn.Module):
    def __init__(self, ratio):
        super().__init__()
        self.pooling_ratio = ratio

    def forward(self, x):
        side = math.isqrt(x.shape[1])
        if side**2 != x.shape[1]:
            raise ValueError(f"{x.shape[1]} tokens are no square")
        grid = x.mT.unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(grid, side // self.pooling_ratio).flatten(2).mT


class PerceptionProjector(nn.Module):
    """As Perception-LM's: an MLP, then adaptive average pooling by a ratio."""

    def __init__(self, channels=8, features=12, ratio=2, act=None, bias=True):
        super().__init__()
        self.linear_1 = nn.Linear(channels, features, bias)
        self.gelu = act or nn.GELU()
        self.linear_2 = nn.Linear(features, features, bias)
        self.pooling = RatioPooling(ratio) if ratio > 1 else nn.Identity()

    def forward(self, features):
        return self.pooling(self.linear_2(self.gelu(self.linear_1(features))))


class PllavaProjector(nn.Module):
    """As PLLaVA's: an MLP, then adaptive average pooling over frames, heights and widths."""

    def __init__(self, channels=8, features=12, frames=4, grid=(6, 5), to=(2, 3, 3)):
        super().__init__()
        self.use_pooling, self.num_frames = True, frames
        self.frame_shape, self.pooling_shape = grid, to
        self.pooling = nn.AdaptiveAvgPool3d(to)
        self.linear_1 = nn.Linear(channels, features)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(features, features)

    def forward(self, image_features, media_type, batch_size=None, num_videos=None):
        x = image_features
        if media_type == "image":
            x = x.repeat(self.num_frames, 1, 1)
        if x.shape[0] < self.num_frames and self.use_pooling:
            times = int(self.num_frames / x.shape[0]) + 1
            x = x.repeat_interleave(times, dim=0)[: self.num_frames]
        assert x.shape[0] % self.num_frames == 0
        y = self.linear_2(self.act(self.linear_1(x)))
        videos, (h, w) = num_videos * batch_size, self.frame_shape
        grid = y.reshape(videos, -1, h, w, y.shape[-1]).permute(0, 4, 1, 2, 3)
        return self.pooling(grid).flatten(2).mT


class Tower(nn.Module):
    """A vision tower whose images are its tokens, already on a square grid."""

    def __init__(self, side):
        super().__init__()
        self.num_patches_per_side = side

    def forward(self, images):
        return images


class Inner(nn.Module):
    def __init__(self, side, channels, features, projector):
        super().__init__()
        self.vision_tower = Tower(side)
        self.mm_projector = projector or nn.Sequential(
            nn.Linear(channels, features), nn.GELU(), nn.Linear(features, features)
        )

    def get_vision_tower(self):
        return self.vision_tower


class MetaForCausalLM:
    """A mixin without ``nn.Module``, as in LLaVA."""

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def encode_images(self, images):
        return self.get_model().mm_projector(self.get_model().get_vision_tower()(images))


class LlavaLike(MetaForCausalLM, nn.Module):
    """As LLaVA-NeXT: projects all images, splits them, and pools those of videos."""

    def __init__(self, mode="average", side=7, channels=8, features=12, projector=None):
        super().__init__()
        self.config = SimpleNamespace(
            mm_spatial_pool_mode=mode, mm_spatial_pool_stride=2, add_faster_video=False
        )
        self.model = Inner(side, channels, features, projector)

    def get_2dPool(self, image_feature, stride=2):
        side = self.get_vision_tower().num_patches_per_side
        frames, _, channels = image_feature.shape
        grid = image_feature.view(frames, side, side, -1).permute(0, 3, 1, 2).contiguous()
        mode = self.config.mm_spatial_pool_mode
        if mode == "average":
            grid = F.avg_pool2d(grid, stride)
        elif mode == "max":
            grid = F.max_pool2d(grid, stride)
        elif mode == "bilinear":
            grid = F.interpolate(grid, [math.ceil(n / stride) for n in grid.shape[2:]], mode=mode)
        else:
            raise ValueError(f"Unexpected mm_spatial_pool_mode: {mode}")
        return grid.permute(0, 2, 3, 1).reshape(frames, -1, channels)

    def encode_multimodals(self, videos_or_images, video_idx_in_batch, split_sizes=None):
        features = self.get_model().get_vision_tower()(videos_or_images)
        slow, fast, stride = [], [], self.config.mm_spatial_pool_stride
        for i, x in enumerate(torch.split(features, split_sizes, dim=0)):
            x = self.get_model().mm_projector(x)
            pooled = faster = 0
            if i in video_idx_in_batch and stride > 1:
                pooled = self.get_2dPool(x, stride)
                if self.config.add_faster_video:
                    stride = stride * 2
                    faster = self.get_2dPool(x, stride)
            slow.append(pooled if isinstance(pooled, torch.Tensor) else x)
            fast.append(faster)
        return slow, fast

    def prepare_inputs_labels_for_multimodal(self, images, modalities=("image",)):
        videos = [i for i, modality in enumerate(modalities) if modality == "video"]
        features = self.encode_images(torch.cat(list(images)))
        features = torch.split(features, [len(x) for x in images])
        features = [self.get_2dPool(x) if i in videos else x for i, x in enumerate(features)]
        return torch.cat([x.flatten(0, 1) for x in features])

    def forward(self, images, modalities=("image",)):
        return self.prepare_inputs_labels_for_multimodal(images, modalities)


class MatryoshkaLike(MetaForCausalLM, nn.Module):
    """As Matryoshka multimodal models: pools to a number of tokens that every call chooses."""

    def __init__(self, side=6, channels=8, features=12):
        super().__init__()
        self.model = Inner(side, channels, features, None)

    def matryoshka_vis_token_process(self, image_features, matryoshka_vis_token_scale):
        n, tokens, channels = image_features.shape
        side = int(tokens**0.5)
        grid = image_features.view(n, side, side, channels).permute(0, 3, 1, 2)
        window = int((tokens / matryoshka_vis_token_scale) ** 0.5)
        grid = F.avg_pool2d(grid, kernel_size=window, stride=window)
        return grid.permute(0, 2, 3, 1).reshape(n, -1, channels)

    def prepare_inputs_labels_for_multimodal(self, images, matryoshka_vis_token_scale=None):
        features = self.encode_images(images)
        if matryoshka_vis_token_scale is not None:
            features = self.matryoshka_vis_token_process(features, matryoshka_vis_token_scale)
        return torch.stack([features[i] for i in range(len(features))])


def downsample_one_by_one(x, grids, merges):
    """VideoLLaMA 3's loop over images [t, h, w] whose tokens go block by block."""
    outputs = []
    for part, (t, h, w), m in zip(x.split(grids.prod(1).tolist()), grids, merges, strict=True):
        part = part.view(t, h // m, w // m, m, m, -1).permute(0, 1, 3, 2, 4, 5)
        part = part.reshape(t, h, w, -1).permute(0, 3, 1, 2)
        part = F.interpolate(part, size=(h // m, w // m), mode="bilinear")
        outputs.append(part.permute(0, 2, 3, 1).reshape(-1, x.shape[-1]))
    return torch.cat(outputs)


class UnshufflingTower(nn.Module):
    """As VideoLLaMA 3 in transformers."""

    def __init__(self, channels=8):
        super().__init__()
        self.post_layernorm = nn.LayerNorm(channels)

    def pixel_unshuffle(self, hidden_states, grid_thw, merge_sizes):
        return downsample_one_by_one(hidden_states, grid_thw, merge_sizes)

    def forward(self, pixel_values, grid_thw, merge_sizes):
        return self.pixel_unshuffle(self.post_layernorm(pixel_values), grid_thw, merge_sizes)


class Layers(nn.Module):
    """An encoder of one layer."""

    def __init__(self, channels):
        super().__init__()
        self.layer = nn.Linear(channels, channels)

    def forward(self, x, grid_sizes, merge_sizes):
        return x + self.layer(x)


class EncoderTower(nn.Module):
    """As VideoLLaMA 3 was published: the loop ends the forward."""

    def __init__(self, channels=8):
        super().__init__()
        self.embeddings = nn.Linear(channels, channels)
        self.encoder = Layers(channels)
        self.post_layernorm = nn.LayerNorm(channels)

    def forward(self, pixel_values, grid_sizes, merge_sizes=None):
        x = self.encoder(self.embeddings(pixel_values), grid_sizes, merge_sizes)
        return downsample_one_by_one(self.post_layernorm(x), grid_sizes, merge_sizes)


class AttentionResampler(nn.Module):
    """Pooling by attention."""

    def __init__(self, channels=8, queries=4):
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, channels))
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x):
        return self.attention(self.query.expand(len(x), -1, -1), x, x)[0]


class LoraLinear(nn.Module):
    """As adapters do: wraps a linear layer and offers its weight."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Quantised(nn.Linear):
    """Without parameters, as torch's dynamically quantised layers."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, device="meta")
        kept = base.weight.detach(), base.bias.detach()
        del self.weight, self.bias
        self.kept = kept

    def forward(self, x):
        return nn.functional.linear(x, *self.kept)
