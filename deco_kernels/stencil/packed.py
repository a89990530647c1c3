"""Which windows, where the images of one packed sequence differ in size?

A pack is a list of geometries, one for every frame and every run of tokens that pass. Their
tables are kept by geometry, so that a new list of images costs little more than to join them.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from . import geometry
from .kept import Kept
from .numbers import check_count
from .table import Pair, Piece, check_entries, concatenated, piece


class Pack(NamedTuple):
    """The geometries of all blocks, and the tokens of every image."""

    geometries: tuple[geometry.Geometry, ...]
    n_in: tuple[int, ...]
    n_out: tuple[int, ...]


class Image(NamedTuple):
    """``frames`` grids of one size."""

    frames: int
    grid: tuple[int, int]


Grids = Sequence[Sequence[int]] | torch.Tensor
MODES = ("adaptive", "area", "bilinear")


def pack(
    grids: Grids,
    target: Sequence[int] | Grids | None,
    merge: int | None,
    mode: str,
    cu_seqlens: Sequence[int] | torch.Tensor | None,
    passthrough: int,
) -> Pack:
    """Check the arguments of ``Stencil.packed`` and list its blocks."""
    images = _images(grids)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if (target is None) == (merge is None):
        raise ValueError(f"give target or merge, got target={target!r} and merge={merge!r}")
    if merge is None:
        targets = _targets(target, len(images))
    elif mode == "bilinear":
        raise ValueError("merge averages windows: it goes with mode 'adaptive', got 'bilinear'")
    else:
        targets = _merged(images, check_count("merge", merge))
    check_count("passthrough", passthrough, least=0)
    passing = (geometry.identity(passthrough),) if passthrough else ()
    interpolate = mode == "bilinear"
    blocks, n_in, n_out = [], [], []
    for (frames, grid), size in zip(images, targets, strict=True):
        blocks += (*passing, *(_block(grid, size, interpolate),) * frames)
        n_in.append(passthrough + frames * grid[0] * grid[1])
        n_out.append(passthrough + frames * size[0] * size[1])
    geometry.check_tokens("the pack", sum(n_in))
    geometry.check_tokens("the pooled pack", sum(n_out))
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, images, n_in, passthrough)
    return Pack(tuple(blocks), tuple(n_in), tuple(n_out))


@lru_cache(maxsize=4096)
def _block(
    grid_in: tuple[int, int], grid_out: tuple[int, int], interpolate: bool
) -> geometry.Geometry:
    return (geometry.bilinear if interpolate else geometry.adaptive)(grid_in, grid_out)


def tables(blocks: Sequence[geometry.Geometry], dtype: torch.dtype) -> Pair:
    """Rows and columns of the block-diagonal matrix of geometries, on the CPU."""
    shapes = [geometry.shape(block) for block in blocks]
    n_out, n_in = [shape.n_out for shape in shapes], [shape.n_in for shape in shapes]
    sides = []
    for side, heights, spans in ((0, n_out, n_in), (1, n_in, n_out)):
        width = max(shape.widths[side] for shape in shapes)
        check_entries(sum(heights), width)
        pieces = [_piece(block, side, width, dtype) for block in blocks]
        sides.append(concatenated(pieces, heights, spans, width, dtype))
    rows, columns = sides
    return rows, columns


_pieces = Kept(lambda piece: len(piece.index) + len(piece.weight))


def _piece(block: geometry.Geometry, side: int, width: int, dtype: torch.dtype) -> Piece:
    key = block, side, width, dtype
    return _pieces.get(key, lambda: piece(geometry.table(block, side, dtype).widened(width)))


def integers(name: str, values: object) -> list:
    """The numbers of a list, or of an integer tensor on the CPU.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if isinstance(values, torch.Tensor):
        check_cpu_integers(name, values)
        return values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a list or a CPU tensor, got {type(values).__name__}")
    return list(values)


def check_cpu_integers(name: str, values: torch.Tensor) -> None:
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"{name} must hold integers, got {values.dtype}")
    if values.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the CPU, got {values.device}: reading it there would wait for"
            " the device"
        )


def _images(grids: Grids) -> list[Image]:
    found = []
    for i, grid in enumerate(integers("grids", grids)):
        if not isinstance(grid, (tuple, list)) or len(grid) not in (2, 3):
            raise ValueError(
                f"grids[{i}] must be (height, width) or (frames, height, width), got {grid!r}"
            )
        for n in grid:
            if type(n) is not int or n <= 0:  # spares the names of good ones, which take time
                grid = [check_count(f"grids[{i}][{j}]", m) for j, m in enumerate(grid)]
        *frames, h, w = grid
        found.append(Image(frames[0] if frames else 1, (h, w)))
    if not found:
        raise ValueError("grids must hold an image, got none")
    return found


def _targets(target: Sequence[int] | Grids, images: int) -> list[tuple[int, int]]:
    values = integers("target", target)
    if len(values) == 2 and not any(isinstance(v, Sequence) for v in values):
        return [(check_count("target[0]", values[0]), check_count("target[1]", values[1]))] * images
    if len(values) != images:
        raise ValueError(f"target must be (height, width), or {images} of them, got {target!r}")
    found = []
    for i, size in enumerate(values):
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"target[{i}] must be (height, width), got {size!r}")
        found.append(tuple([check_count(f"target[{i}][{j}]", n) for j, n in enumerate(size)]))
    return found


def _merged(images: Sequence[Image], merge: int) -> list[tuple[int, int]]:
    for i, (_, (h, w)) in enumerate(images):
        if h % merge or w % merge:
            raise ValueError(f"merge = {merge} must divide the grid of image {i}, got {h}x{w}")
    return [(h // merge, w // merge) for _, (h, w) in images]


def _check_cu_seqlens(
    cu_seqlens: Sequence[int] | torch.Tensor,
    images: Sequence[Image],
    n_in: Sequence[int],
    passthrough: int,
) -> None:
    """Boundaries of the images or, as Qwen2-VL has them, of all their frames."""
    found = [
        check_count(f"cu_seqlens[{i}]", n, least=0)
        for i, n in enumerate(integers("cu_seqlens", cu_seqlens))
    ]
    owners, lengths = list(range(len(images))), list(n_in)
    frames = sum(image.frames for image in images)
    if not passthrough and len(found) == frames + 1:
        owners = [i for i, image in enumerate(images) for _ in range(image.frames)]
        lengths = [h * w for frames, (h, w) in images for _ in range(frames)]
    if len(found) != len(lengths) + 1:
        or_frames = f" or {frames} frames" if frames != len(images) and not passthrough else ""
        raise ValueError(
            f"cu_seqlens must have one number more than the {len(images)} images{or_frames},"
            f" got {len(found)}"
        )
    if found[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, got {found[0]}")
    wanted = list(accumulate(lengths, initial=0))
    if found == wanted:
        return
    for i, owner in enumerate(owners):
        start, end = found[i], found[i + 1]
        if end - start != lengths[i]:
            h, w = images[owner].grid
            raise ValueError(
                f"cu_seqlens must agree with the grids: image {owner} with grid {h}x{w} has"
                f" {lengths[i]} tokens, but cu_seqlens goes from {start} to {end}"
            )
