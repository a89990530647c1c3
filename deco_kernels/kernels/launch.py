"""How does a kernel start? One door for all launches, so that tests and tools can stand in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled: tile sizes (constexprs by name), warps and pipeline stages."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """For Triton; whose default for fused multiply-adds is on before 3.10, and then off."""
        how = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**how, "enable_fp_fusion": True}

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={size}" for name, size in self.tiles.items())
        return f"{tiles} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True)
class Chip:
    """What a launcher needs to know of a device: compute capability (90 for 9.0) and SM count."""

    arch: int
    sms: int


Launch = Callable[..., None]  # (kernel, grid, config, arguments by name)


def _launch_on_device(
    kernel: Any, grid: tuple[int, ...], config: Config, args: dict[str, Any]
) -> None:
    kernel[grid](**args, **config.tiles, **config.options)


_stand_in: tuple[Chip, Launch] | None = None


@contextmanager
def stand_in(chip: Chip, launch: Launch) -> Iterator[None]:
    """Send every launch to ``launch(kernel, grid, config, args)`` in place of a device."""
    global _stand_in
    before, _stand_in = _stand_in, (chip, launch)
    try:
        yield
    finally:
        _stand_in = before


def standing_in() -> bool:
    return _stand_in is not None


@lru_cache(maxsize=64)
def _cuda_chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


def chip_of(device: torch.device) -> Chip:
    """The chip that launches for tensors on ``device`` go to."""
    if _stand_in is not None:
        return _stand_in[0]
    if device.type == "cuda":
        return _cuda_chip(device.index)
    return Chip(80, 1)  # Triton's interpreter: any chip's tiles do


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **args: Any) -> None:
    """Launch ``kernel`` on the current stream of its arguments' device."""
    if _stand_in is not None:
        _stand_in[1](kernel, grid, config, args)
        return
    device = next(a.device for a in args.values() if isinstance(a, torch.Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            _launch_on_device(kernel, grid, config, args)
    else:
        _launch_on_device(kernel, grid, config, args)
