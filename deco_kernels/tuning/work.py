"""What does a launch read, write and multiply? Counted from the shape and the configuration.

Tests compare the counts with those of the executed PTX of sm_80.
"""

from dataclasses import dataclass

import torch

from ..kernels.launch import Config
from ..stencil import Stencil

SECTOR = 32  # bytes
WARP_ROW = 512  # bytes: what a warp loads at once, 16 bytes a thread
HEADER = 2  # integers of the workspace before the flags


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Shape:
    """The sizes of a pooling and a linear layer after it.

    Attributes:
        batch: images.
        tokens_in, tokens_out: tokens of an image before and after pooling.
        window: columns of the gather table, T.
        reads: tokens that an image's pooling reads: entries of the table with a weight.
        channels: of the tokens, K; what the product sums over. 16 must divide it.
        features: columns of the product, N. 16 must divide it.
        dtype: of every tensor; float32 is multiplied as TF32.
    """

    batch: int
    tokens_in: int
    tokens_out: int
    window: int
    reads: int
    channels: int
    features: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.channels % 16 or self.features % 16:
            got = f"{self.channels} and {self.features}"
            raise ValueError(f"the model is for channels and features that 16 divides, got {got}")

    @classmethod
    def adaptive(
        cls,
        batch: int,
        grid_in: tuple[int, int],
        grid_out: tuple[int, int],
        channels: int,
        features: int,
        dtype: torch.dtype = torch.bfloat16,
        transposed: bool = False,
    ) -> "Shape":
        """For :meth:`Stencil.adaptive`; ``transposed`` for its backward, from out to in."""
        stencil = Stencil.adaptive(grid_in, grid_out)
        table, tokens = stencil.tables()[transposed], (stencil.n_in, stencil.n_out)
        n_in, n_out = reversed(tokens) if transposed else tokens
        reads = int(torch.count_nonzero(table.weight))
        return cls(batch, n_in, n_out, table.index.shape[1], reads, channels, features, dtype)

    @property
    def rows(self) -> int:
        """Rows of P."""
        return self.batch * self.tokens_out

    @property
    def x_bytes(self) -> int:
        """Of X [batch, tokens_in, K]."""
        return self.batch * self.tokens_in * self.channels * self.dtype.itemsize

    @property
    def p_bytes(self) -> int:
        """Of P [rows, K]; in a backward, of what the product takes."""
        return self.rows * self.channels * self.dtype.itemsize

    @property
    def w_bytes(self) -> int:
        """Of the weight [N, K]."""
        return self.features * self.channels * self.dtype.itemsize

    @property
    def z_bytes(self) -> int:
        """Of Z, and of every other tensor [rows, N]."""
        return self.rows * self.features * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the product, without padding."""
        return 2 * self.rows * self.features * self.channels


@dataclass(frozen=True)
class Traffic:
    """Accesses to one buffer: bytes as the threads ask for them, and 32-byte sectors."""

    bytes: int
    sectors: int


def _whole(nbytes: int) -> Traffic:
    """Coalesced accesses, every byte of a sector used."""
    return Traffic(nbytes, nbytes // SECTOR)


@dataclass(frozen=True)
class Counts:
    """What one launch asks of global memory, by buffer, and of the tensor cores.

    Attributes:
        loads, stores: by the name of the kernel's argument; atomics count as stores.
        mma: executed warp instructions ``mma.sync`` (sm_80), padding of tiles included.
    """

    loads: dict[str, Traffic]
    stores: dict[str, Traffic]
    mma: int = 0

    def l2_to_sm_bytes(self, *names: str) -> int:
        """Loaded sectors of these buffers (default: all), as if L1 kept no table and no bias."""
        return SECTOR * sum(self.loads[name].sectors for name in names or self.loads)


def _mma(shape: Shape, tiles: dict[str, int]) -> int:
    depth = 16 if shape.dtype.itemsize == 2 else 8  # m16n8k16, m16n8k8
    rows = cdiv(shape.rows, tiles["BM"]) * tiles["BM"] // 16
    columns = cdiv(shape.features, tiles["BN"]) * tiles["BN"] // 8
    return rows * columns * (cdiv(shape.channels, tiles["BK"]) * tiles["BK"] // depth)


def _gather(shape: Shape, config: Config, rows: int, passes: int) -> dict[str, Traffic]:
    """Loads of pooling ``rows`` rows (with padding) in ``passes`` blocks of channels."""
    # A warp covers 512 bytes of a row, so every one that shares a row reads the row's table entry:
    # all its lanes the same four bytes.
    warps = config.tiles["PK"] * shape.dtype.itemsize // WARP_ROW
    if not 1 <= warps <= config.num_warps:
        raise ValueError(f"PK must be {WARP_ROW} bytes or more, and at most that a warp: {config}")
    requests = rows * shape.window * passes * warps
    table = Traffic(32 * 4 * requests, requests)
    x = shape.batch * shape.reads * shape.channels * shape.dtype.itemsize
    return {"x": _whole(x), "index": table, "weight": table}


def _pool(shape: Shape, config: Config, sms: int) -> Counts:
    rows = cdiv(shape.rows, config.tiles["PM"]) * config.tiles["PM"]
    passes = cdiv(shape.channels, config.tiles["PK"])
    return Counts(_gather(shape, config, rows, passes), {"p": _whole(shape.p_bytes)})


def _pool_linear(shape: Shape, config: Config, sms: int) -> Counts:
    tiles = config.tiles
    panels, columns, slots, ctas = tasks(shape, config, sms)
    loads = _gather(shape, config, panels * tiles["BM"], cdiv(shape.channels, tiles["PK"]))
    loads["p"] = _whole(columns * shape.p_bytes)
    loads["w"] = _whole(panels * shape.w_bytes)
    # A row of warps for each 64 rows of a tile, of which eight rows of lanes ask for the same 8
    # columns in each request.
    requests = tiles["BM"] // 64 * panels * shape.features // 8
    loads["bias"] = Traffic(requests * 8 * 8 * shape.dtype.itemsize, requests)
    # If nobody had to wait: a look at the flag a tile; tickets, raised flags and farewells; reset.
    looks = panels * columns
    atomics = panels * (slots + columns) + ctas + panels * slots + ctas
    reset = HEADER + panels
    loads["workspace"] = Traffic(4 * looks, looks)
    stores = {"p": _whole(shape.p_bytes), "z": _whole(shape.z_bytes), "g": _whole(shape.z_bytes)}
    stores["workspace"] = Traffic(4 * (atomics + reset), atomics + cdiv(4 * reset, SECTOR))
    return Counts(loads, stores, _mma(shape, tiles))


def tasks(shape: Shape, config: Config, sms: int) -> tuple[int, int, int, int]:
    """Panels, columns of tiles, pool tasks of a panel and CTAs, as the launcher has them."""
    panels = cdiv(shape.rows, config.tiles["BM"])
    columns = cdiv(shape.features, config.tiles["BN"])
    slots = config.tiles["BM"] // config.tiles["PM"]
    return panels, columns, slots, min(panels * (slots + columns), 2 * sms)


def _dact_linear(shape: Shape, config: Config, sms: int) -> Counts:
    panels = cdiv(shape.rows, config.tiles["BM"])
    columns = cdiv(shape.features, config.tiles["BN"])
    loads = {
        "dy": _whole(columns * shape.p_bytes),
        "w": _whole(panels * shape.w_bytes),
        "z": _whole(shape.z_bytes),
    }
    out = _whole(shape.z_bytes)
    stores = {"dz": out, "g": out, "sums": _whole(4 * panels * shape.features)}
    return Counts(loads, stores, _mma(shape, config.tiles))


_COUNTED = {"pool": _pool, "pool_linear": _pool_linear, "dact_linear": _dact_linear}


def counts(kernel: str, shape: Shape, config: Config, sms: int) -> Counts:
    """What one launch of a Triton kernel does in training.

    Exact on sm_80 if no CTA has to wait for a flag; wgmma, and other numbers of warps than
    :mod:`.rank` gives a tile, load the bias in other pieces.

    Args:
        kernel: "pool" (also with a transposed shape), "pool_linear" (with a bias, keeping Z and G)
            or "dact_linear" (emitting G and sums; its ``dy`` is as wide as ``shape.channels``).
        shape: contiguous tensors of one dtype.
        config: PK of 512 bytes or more.
        sms: of the chip; "pool_linear" launches up to two CTAs for each.

    Raises:
        ValueError: the pool's block is of a form that nobody compared with executed counts.
    """
    return _COUNTED[kernel](shape, config, sms)
