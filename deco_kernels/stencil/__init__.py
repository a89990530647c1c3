"""Which tokens, which weights? Every pooling is a sparse matrix ``P = S X``; this is S."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from math import prod

import torch

from ..host.streams import capturing, current_stream
from . import geometry as grids
from . import packed, positions
from .geometry import Geometry
from .numbers import check_count
from .places import Places, of_grid, plain_mode
from .table import CPU, Pair, Table, check_entries, concatenated, piece

__all__ = ["Places", "Stencil", "Table", "plain_mode"]


class Stencil:
    """A pooling of ``n_in`` tokens to ``n_out`` tokens, as two gather tables.

    Build one with a constructor such as :meth:`Stencil.adaptive`. It is immutable. A stencil of one
    grid is no more than a geometry; its tables are built once and kept on every device that asks
    for them. :meth:`packed`, :meth:`from_position_ids` and :meth:`concat` build their tables
    at once, for the CPU, and must be called outside of a compiled function: pass it the stencil.

    Grids have one to three axes: (length,), (height, width) or (time, height, width). Their tokens
    are in order of the last axis first, row by row.

    Attributes:
        geometry: the constructor and its arguments, as "adaptive 24x24 12x12".
        grid: the geometry as numbers, of a stencil of one grid; None for any other.
        n_in: number of input tokens.
        n_out: number of output tokens.
        lengths: number of output tokens of every image of a pack, sample of a batch of position
            ids, or part of a concatenation; else one number. ``p[0].split(stencil.lengths)``.
        sums_to_one: whether every output is an average. Only then may a linear layer with a bias
            change places with the pooling. Zeros that count as padding and cells with missing
            tokens break it.
    """

    __slots__ = ("_source", "_tables", "_title", "grid", "lengths", "n_in", "n_out", "sums_to_one")

    def __init__(
        self,
        grid: Geometry | None,
        n_in: int,
        n_out: int,
        lengths: tuple[int, ...] | None = None,
        source: Callable[[torch.dtype], Pair] | None = None,
        sums_to_one: bool = True,
        title: str = "",
    ) -> None:
        """For the constructors; without a grid ``source`` makes the tables on the CPU."""
        self.grid, self._title, self.n_in, self.n_out = grid, title, n_in, n_out
        self.lengths, self.sums_to_one = lengths or (n_out,), sums_to_one
        self._source, self._tables = source, {}
        if source is not None:
            with plain_mode():
                self._tables[CPU, torch.float32, 0] = source(torch.float32)

    @property
    def geometry(self) -> str:
        return self._title or str(self.grid)

    def __repr__(self) -> str:
        return f"Stencil({self.geometry}: {self.n_in} -> {self.n_out} tokens)"

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """Where the outputs of every image start and end: int32 [len(lengths) + 1], on the CPU."""
        ends = list(accumulate(self.lengths, initial=0))
        return torch.tensor(ends, dtype=torch.int32, device="cpu")

    def check_average(self, what: str) -> None:
        """Raise a ValueError that names the first output whose weights do not sum to one."""
        if self.sums_to_one:
            return
        rows, _ = self.tables("cpu", torch.float64)
        sums = rows.weight.sum(1)
        output = int(((sums - 1).abs() > 1e-9).nonzero()[0])
        ends = list(accumulate(self.lengths))
        image = next(i for i, end in enumerate(ends) if output < end)
        raise ValueError(
            f"{what} needs weights that sum to 1: of image {image} of {self}, those of output"
            f" {output - ends[image] + self.lengths[image]} sum to {sums[output]:.4g}"
        )

    @classmethod
    def adaptive(cls, grid_in: Sequence[int], grid_out: Sequence[int]) -> "Stencil":
        """Adaptive average pooling of a grid of one to three axes.

        The windows are those of ``torch.nn.AdaptiveAvgPool{1,2,3}d``: output o of an axis averages
        inputs ``floor(o*in/out)`` up to ``ceil((o+1)*in/out)``. They may overlap, differ in size,
        and ``grid_out`` may be larger than ``grid_in``.

        Raises:
            TypeError, ValueError: a grid is not one to three positive integers, or they have not
                as many axes, or more tokens than an int32 counts.
        """
        grid_in = grids.check_grid("grid_in", grid_in)
        return cls.adaptive_checked(grid_in, grids.check_grid("grid_out", grid_out, grid_in))

    @classmethod
    def adaptive_checked(cls, grid_in: tuple[int, ...], grid_out: tuple[int, ...]) -> "Stencil":
        """:meth:`adaptive` for grids that a caller has checked."""
        if torch.compiler.is_compiling():  # sizes that vary have no hash
            return cls._of_grid(grids.adaptive(grid_in, grid_out))
        return _adaptive(grid_in, grid_out)

    @classmethod
    def area(cls, grid_in: Sequence[int], grid_out: Sequence[int]) -> "Stencil":
        """``F.interpolate(mode="area")`` to a size, which is :meth:`adaptive`."""
        return cls.adaptive(grid_in, grid_out)

    @classmethod
    def bilinear(
        cls, grid_in: Sequence[int], grid_out: Sequence[int], align_corners: bool = False
    ) -> "Stencil":
        """Linear interpolation to a size, along all axes; no antialiasing.

        That of ``F.interpolate`` with mode "linear", "bilinear" or "trilinear". Shrinking by more
        than 2 skips tokens.

        Raises:
            TypeError, ValueError: as :meth:`adaptive`.
        """
        grid_in = grids.check_grid("grid_in", grid_in)
        grid_out = grids.check_grid("grid_out", grid_out, grid_in)
        return cls._of_grid(grids.bilinear(grid_in, grid_out, align_corners))

    @classmethod
    def fixed(
        cls,
        grid_in: Sequence[int],
        kernel: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> "Stencil":
        """Average pooling by windows of one size, as ``F.avg_pool{1,2,3}d``.

        Args:
            grid_in: one to three axes.
            kernel, stride, padding: one int, or one for each axis; the stride is the kernel unless
                it is given.
            ceil_mode: whether a window that begins inside but ends outside counts too.
            count_include_pad: whether padding counts as zeros. Then windows at the border do not
                sum to one, see :attr:`sums_to_one`.

        Raises:
            TypeError, ValueError: as :meth:`adaptive`; the padding is more than half the kernel, or
                the kernel exceeds the padded grid.
        """
        grid_in = grids.check_grid("grid_in", grid_in)
        kernel = grids.check_per_axis("kernel", kernel, len(grid_in), least=1)
        stride = kernel if stride is None else stride
        stride = grids.check_per_axis("stride", stride, len(grid_in), least=1)
        padding = grids.check_per_axis("padding", padding, len(grid_in), least=0)
        found = grids.fixed(grid_in, kernel, stride, padding, ceil_mode, count_include_pad)
        return cls._of_grid(found, average=not (count_include_pad and any(padding)))

    @classmethod
    def identity(cls, n: int) -> "Stencil":
        """``n`` tokens that pass as they are; for :meth:`concat`."""
        n = check_count("n", n)
        return cls._of_grid(grids.identity(n))

    @classmethod
    def _of_grid(cls, geometry: Geometry, average: bool = True) -> "Stencil":
        grid_in, grid_out, *_ = geometry.parts()
        n_in, n_out = prod(grid_in), prod(grid_out)
        grids.check_tokens("grid_in", n_in)
        grids.check_tokens("the pooled grid", n_out)
        return cls(geometry, n_in, n_out, sums_to_one=average)

    @classmethod
    def concat(cls, stencils: Sequence["Stencil"]) -> "Stencil":
        """Several poolings, each of the tokens behind those of the one before.

        ``Stencil.concat([Stencil.identity(1), Stencil.adaptive(grid_in, grid_out)])`` keeps a
        class token in front of the pooled ones.

        Raises:
            TypeError: not a list of stencils.
            ValueError: it is empty, or they have more tokens than an int32 counts.
        """
        stencils = tuple(stencils)
        for i, stencil in enumerate(stencils):
            if not isinstance(stencil, Stencil):
                raise TypeError(f"stencils[{i}] must be a Stencil, got {type(stencil).__name__}")
        if not stencils:
            raise ValueError("stencils must hold a stencil, got none")
        n_in, lengths = sum(s.n_in for s in stencils), tuple(s.n_out for s in stencils)
        grids.check_tokens("the concatenation", n_in)
        grids.check_tokens("the pooled concatenation", sum(lengths))
        title = " + ".join(s.geometry for s in stencils)
        average = all(s.sums_to_one for s in stencils)
        source = partial(_concatenated, stencils)
        return cls(None, n_in, sum(lengths), lengths, source, average, title)

    @classmethod
    def packed(
        cls,
        grids: packed.Grids,
        *,
        target: Sequence[int] | packed.Grids | None = None,
        merge: int | None = None,
        mode: str = "adaptive",
        cu_seqlens: Sequence[int] | torch.Tensor | None = None,
        passthrough: int = 0,
    ) -> "Stencil":
        """Images of different sizes in one sequence, [1, N, C] or x[None] of a packed [N, C].

        The tokens of an image are row by row, frame by frame, and each frame is pooled by itself.
        Inside Qwen2-VL's vision tower they are not, but 2x2 block by block: pool behind its merger,
        with the grids (t, h / 2, w / 2) that it leaves. Nothing here waits for a device.

        Args:
            grids: (height, width) or (frames, height, width) of every image, as a list or an
                integer tensor on the CPU, such as ``image_grid_thw``.
            target: the (height, width) that every frame becomes, for all images or for each.
            merge: instead of a target, windows of merge x merge tokens.
            mode: "adaptive" (which is "area"), or "bilinear" without aligned corners.
            cu_seqlens: where images (or all their frames) start and end, on the CPU. It is only
                compared with the grids.
            passthrough: how many tokens in front of every image pass as they are.

        Raises:
            TypeError, ValueError: the arguments do not fit each other; names the image.
        """
        pack = packed.pack(grids, target, merge, mode, cu_seqlens, passthrough)
        how = "merge" if merge is not None else mode
        return _packed(f"packed {how}, {len(pack.n_in)} images", pack)

    @classmethod
    def from_position_ids(cls, position_ids: torch.Tensor, kernel: int) -> "Stencil":
        """Average kernel x kernel tokens by their positions, leaving out padding, as Gemma 4 does.

        Follows ``Gemma4VisionPooler`` of transformers: cell (x // kernel, y // kernel), row by row,
        every token weighs 1 / kernel**2 even where a cell has fewer (see :attr:`sums_to_one`), and
        outputs without tokens are dropped. What stock code would mix up silently is an error here.

        Args:
            position_ids: (x, y) of every token, integers [batch, tokens, 2] or [tokens, 2] on the
                CPU; (-1, -1) for padding. The stencil is for the flattened batch: x of shape
                [batch, tokens, C] becomes x.reshape(1, -1, C).
            kernel: the side of a cell; divides the width of every image.

        Raises:
            TypeError: not a tensor of integers, or kernel is not an int.
            ValueError: ids that are below -1, twice the same, or leave an output empty; an image
                of nothing but padding, or of a width that the kernel does not divide; not on the
                CPU.
        """
        kernel = check_count("kernel", kernel)
        with plain_mode():
            output, lengths, whole = positions.cells(position_ids, kernel)
        title = f"positions {kernel}x{kernel}, {len(lengths)} images"
        source = partial(_by_position, output, sum(lengths), kernel)
        return cls(None, len(output), sum(lengths), lengths, source, whole, title)

    def tables(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> tuple[Table, Table]:
        """The gather table of the pooled tokens [n_out, T], and its transpose [n_in, U].

        The transpose gathers the gradient of the input tokens, without atomics. ``dtype`` is that
        of the weights. A captured CUDA graph reads the tables where they are: keep a stencil that
        is no grid's as long as the graph.

        Raises:
            RuntimeError: tables that are not there yet are asked for where they cannot be made: on
                the device while a CUDA graph is captured, or a pack's in float64 in a compiled
                function.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if self.grid is not None:
            return of_grid(self.grid, device, dtype)
        if torch.compiler.is_compiling():
            return self._of_graph(device, dtype)
        key = device, dtype, current_stream(device)  # another stream may be ahead of the copy
        if key not in self._tables:
            self._tables[key] = self._copied(device, dtype)
        return self._tables[key]

    def places(self, device: torch.device, dtype: torch.dtype) -> Places:
        """What operators take for tokens of ``dtype`` on ``device``."""
        if self.grid is not None:
            return Places(None, None, None, None, False, False, *self.grid)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        rows, columns = self.tables(device, kind)
        tensors = rows.index, rows.weight, columns.index, columns.weight
        return Places(*tensors, rows.ragged, columns.ragged, "", ())

    def _of_graph(self, device: torch.device, dtype: torch.dtype) -> Pair:
        """The tables as inputs of a compiled graph, not constants: other packs will take it too."""
        key = CPU, dtype, 0
        if key not in self._tables:
            raise RuntimeError(f"call tables('cpu', {dtype}) before the compiled function")
        rows, columns = self._tables[key]
        return rows.to(device, dtype, True), columns.to(device, dtype, True)

    def _copied(self, device: torch.device, dtype: torch.dtype) -> Pair:
        if capturing(device):  # what was copied on any stream before is there by now
            for (place, kind, _), tables in self._tables.items():
                if (place, kind) == (device, dtype):
                    return tables
            raise RuntimeError(f"call tables('{device}', {dtype}) before a CUDA graph is captured")
        with plain_mode():
            rows, columns = self._source(dtype)
            return rows.to(device, dtype, True), columns.to(device, dtype, True)

    def __reduce__(self) -> tuple:
        """Without its tables, which are larger than what they are made from."""
        facts = self.grid, self.n_in, self.n_out, self.lengths, self._source, self.sums_to_one
        return Stencil, (*facts, self._title)


@lru_cache(maxsize=4096)
def _adaptive(grid_in: tuple[int, ...], grid_out: tuple[int, ...]) -> Stencil:
    return Stencil._of_grid(grids.adaptive(grid_in, grid_out))


@lru_cache(maxsize=8)
def _packed(title: str, pack: packed.Pack) -> Stencil:
    source = partial(packed.tables, pack.geometries)
    return Stencil(None, sum(pack.n_in), sum(pack.n_out), pack.n_out, source, title=title)


def _by_position(output: torch.Tensor, n_out: int, kernel: int, dtype: torch.dtype) -> Pair:
    rows, columns = positions.tables(output, n_out, kernel)
    return rows.to(output.device, dtype), columns.to(output.device, dtype)


def _concatenated(stencils: tuple[Stencil, ...], dtype: torch.dtype) -> Pair:
    pairs = [stencil.tables("cpu", dtype) for stencil in stencils]
    spans = [s.n_in for s in stencils], [s.n_out for s in stencils]
    rows, columns = (
        _joined(side, span) for side, span in zip(zip(*pairs, strict=True), spans, strict=True)
    )
    return rows, columns


def _joined(tables: Sequence[Table], spans: Sequence[int]) -> Table:
    width = max(table.index.shape[1] for table in tables)
    heights = [table.index.shape[0] for table in tables]
    check_entries(sum(heights), width)
    pieces = [piece(table.widened(width)) for table in tables]
    return concatenated(pieces, heights, spans, width, tables[0].weight.dtype)
