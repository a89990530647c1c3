"""Where does the projector sit? Between the vision tower and the language model of a tiny MLLM."""

import torch
import torch.nn.functional as F
from torch import nn

from ...reference import AvgPoolProjector
from .data import QUESTION_LENGTH, SCAN, SIDE, VOCABULARY

PATCH = 4  # so that a digit covers 2x2 patches, which the projector pools to one token
GRID = SIDE * SCAN // PATCH  # patches along one side of a canvas
TOWER_WIDTH = 64
LM_WIDTH = 64


class Block(nn.Module):
    """A pre-norm transformer block on ``[b, n, width]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """``mask [n, n]`` is True where a token (row) may look at a token (column)."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class TinyVit(nn.Module):
    """The vision tower: images ``[b, s, s]`` to patch tokens ``[b, GRID * GRID, TOWER_WIDTH]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, TOWER_WIDTH, kernel_size=PATCH, stride=PATCH)
        self.position = nn.Parameter(0.1 * torch.randn(GRID * GRID, TOWER_WIDTH))
        self.blocks = nn.Sequential(*(Block(TOWER_WIDTH, heads=4) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(TOWER_WIDTH), nn.Linear(TOWER_WIDTH, TOWER_WIDTH))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.embed(images.unsqueeze(1)).flatten(2).transpose(1, 2)
        return self.head(self.blocks(patches + self.position))


class TinyLM(nn.Module):
    """A causal language model that reads an image prefix and then a question.

    The questions on one image share its prefix: they are packed one behind the other, and the
    mask keeps each from looking at the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(VOCABULARY), LM_WIDTH)
        self.row = nn.Parameter(0.5 * torch.randn(SIDE, 1, LM_WIDTH))
        self.column = nn.Parameter(0.5 * torch.randn(1, SIDE, LM_WIDTH))
        self.position = nn.Parameter(0.5 * torch.randn(QUESTION_LENGTH, LM_WIDTH))
        self.prefix_norm = nn.LayerNorm(LM_WIDTH)
        self.blocks = nn.ModuleList(Block(LM_WIDTH, heads=4) for _ in range(3))
        self.head = nn.Sequential(nn.LayerNorm(LM_WIDTH), nn.Linear(LM_WIDTH, len(VOCABULARY)))

    def forward(self, prefix: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        """``prefix [b, p, LM_WIDTH]``, ``questions [b, q, l]`` to answer logits ``[b, q, v]``."""
        p = prefix.shape[1]
        q, length = questions.shape[1:]
        prefix = self.prefix_norm(prefix) + (self.row + self.column).flatten(0, 1)
        words = self.embed(questions) + self.position
        x = torch.cat([prefix, words.flatten(1, 2)], dim=1)

        part = torch.zeros(p + q * length, dtype=torch.long, device=x.device)  # 0: the prefix
        part[p:] = torch.arange(1, q + 1, device=x.device).repeat_interleave(length)
        mask = ((part == 0) | (part == part[:, None])).tril()
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x[:, p:].unflatten(1, (q, length))[:, :, -1])


class TinyMLLM(nn.Module):
    """Vision tower, projector and language model."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = TinyVit()
        self.projector = AvgPoolProjector(
            layer_num=2,
            query_num=SIDE * SIDE,
            mm_hidden_size=TOWER_WIDTH,
            llm_hidden_size=LM_WIDTH,
        )
        self.lm = TinyLM()

    def forward(self, images: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        """``images [b, s, s]`` and ``questions [b, q, l]`` to answer logits ``[b, q, v]``."""
        return self.lm(self.projector(self.tower(images)), questions)
