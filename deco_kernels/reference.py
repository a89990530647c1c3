"""What is right? The DeCo projector in plain torch and einops: the oracle of all tests."""

import torch
from einops import rearrange
from torch import nn


class AvgPoolProjector(nn.Module):
    """Average-pool the patch tokens on their square grid, then project them with an MLP.

    The projector of DeCo, "Decoupling token compression from semantic abstraction in multimodal
    large language models" (Yao et al., 2024).

    Args:
        layer_num: number of linear layers, with an exact (erf) GELU between two of them.
        query_num: number of output tokens, a square number.
        mm_hidden_size: channels of a patch token (vision tower).
        llm_hidden_size: channels of an output token (language model).

    The state dict has the keys ``mlp_projector.{0,2,...}.{weight,bias}``.
    """

    def __init__(
        self,
        layer_num: int = 2,
        query_num: int = 144,
        mm_hidden_size: int = 1024,
        llm_hidden_size: int = 4096,
    ) -> None:
        super().__init__()
        self.layer_num = layer_num
        self.query_num = query_num
        self.mm_hidden_size = mm_hidden_size
        self.llm_hidden_size = llm_hidden_size

        side = int(query_num**0.5)
        self.sampler = nn.AdaptiveAvgPool2d((side, side))
        layers: list[nn.Module] = [nn.Linear(mm_hidden_size, llm_hidden_size)]
        for _ in range(1, layer_num):
            layers += [nn.GELU(), nn.Linear(llm_hidden_size, llm_hidden_size)]
        self.mlp_projector = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project patch tokens [b, n, mm_hidden_size] to [b, query_num, llm_hidden_size]."""
        h = w = int(x.shape[1] ** 0.5)
        x = rearrange(x, "b (h w) d -> b d h w", h=h, w=w)
        x = self.sampler(x)
        x = rearrange(x, "b d h w -> b (h w) d")
        return self.mlp_projector(x)
