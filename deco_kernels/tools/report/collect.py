"""What came of the steps? Rows of plain values, for the CSV files, the tables and the plots."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Row = dict[str, Any]
QUANTITIES = ("bytes_read", "bytes_written", "sectors", "mma")

# Columns of `predict`, as a file names them; a gain is the time before it over ours.
_PREDICTED = {
    "fused": "fused_us",
    "pool+Lt": "pool_cublaslt_us",
    "step": "step_us",
    "eager": "eager_step_us",
    "compile": "compiled_step_us",
}


@dataclass
class Results:
    """Rows of each file, as far as there are any; ``benchmarks`` as pytest-benchmark has them.

    ``info`` holds the lines of the command of that name.
    """

    FILES = (
        *("speed.csv", "memory.csv", "projector.csv", "fuse.csv", "packed.csv"),
        *("counts.csv", "launches.csv", "predicted.csv", "auto.csv", "benchmarks.json"),
    )
    info: dict[str, str] = field(default_factory=dict)
    benchmarks: list[Row] = field(default_factory=list)
    counts: list[Row] = field(default_factory=list)
    launches: list[Row] = field(default_factory=list)
    predicted: list[Row] = field(default_factory=list)
    auto: list[Row] = field(default_factory=list)

    def add(self, step: str, output: str, scratch: Path) -> None:
        """Take in what ``step`` printed, and the files that it left in ``scratch``."""
        measured, counted = scratch / f"{step}.json", scratch / f"{step}.xml"
        if measured.exists() and measured.stat().st_size:  # it is empty where nothing was measured
            self.benchmarks += map(_plain, json.loads(measured.read_text())["benchmarks"])
        if counted.exists():
            for name, row in _properties(counted):
                getattr(self, name).append(row)
        if step == "info":
            lines = (re.split(r"\s{2,}", line, maxsplit=1) for line in output.splitlines())
            self.info = {line[0]: line[1] for line in lines if len(line) == 2}
        if step == "predict":
            self.predicted, self.auto = list(predictions(output)), list(decisions(output))

    def files(self) -> dict[str, str]:
        """File name and content of all there is so far."""
        measured = (of(self.benchmarks) for of in (speed, memory, projector, fuse, packed))
        tables = *measured, self.counts, self.launches, self.predicted, self.auto
        texts = [_csv(rows) for rows in tables]
        lines = ",\n".join(map(json.dumps, self.benchmarks))
        texts.append(f"[\n{lines}\n]\n" if lines else "")
        return {name: text for name, text in zip(self.FILES, texts, strict=True) if text}


def _plain(benchmark: Row) -> Row:
    """Without what names the machine, and without every single time."""
    kept = {key: benchmark[key] for key in ("group", "name", "params", "extra_info")}
    stats = {key: benchmark["stats"][key] for key in ("min", "median", "max", "rounds")}
    return {**kept, "stats": stats}


def _of(file: str, benchmarks: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """The first columns, and ``extra_info``, of the benchmarks of test_``file``."""
    for each in benchmarks:
        if each["name"].startswith(f"test_{file}["):
            shape, mode = each["group"].partition(",")[0].split(" ")
            info = each["extra_info"]
            first = {"shape": shape, "mode": mode, "provider": each["params"]["provider"]}
            yield first | {"sizes": info["shape"], "dtype": info["dtype"][6:]}, info


def speed(benchmarks: Sequence[Row]) -> list[Row]:
    """A row for each shape, mode and provider; times are the device's own, medians."""
    rows = []
    for first, info in _of("speed", benchmarks):
        low, high = info["ratio_range"]
        rows.append(
            first
            | {
                "device": info["device"],
                "milliseconds": _digits(info["milliseconds"]),
                "eager_milliseconds": _digits(info["eager_milliseconds"]),
                "ratio_to_eager": _digits(info["ratio_to_eager"]),
                "ratio_lowest": _digits(low),
                "ratio_highest": _digits(high),
                "gigabytes_per_second": _digits(info["gigabytes_per_second"]),
                "teraflop_per_second": _digits(info["teraflop_per_second"]),
                "percent_of_roofline": _digits(info["percent_of_roofline"]),
                "peak_teraflop_per_second": info.get("peak_teraflop_per_second"),
                "peak_gigabytes_per_second": info.get("peak_gigabytes_per_second"),
                "saved_bytes": info.get("saved_bytes"),
                "peak_memory_bytes": info["peak_memory_bytes"],
            }
        )
    return rows


def memory(benchmarks: Sequence[Row]) -> list[Row]:
    """A row for each shape, mode and provider: exact bytes that autograd keeps."""
    return [
        first
        | {
            "saved_bytes": info["saved_bytes"],
            "eager_saved_bytes": info["eager_saved_bytes"],
            "ratio_to_eager": _digits(info["saved_bytes"] / info["eager_saved_bytes"]),
        }
        for first, info in _of("saved_bytes", benchmarks)
    ]


def projector(benchmarks: Sequence[Row]) -> list[Row]:
    """The fused projector beside the oracle, as the host sees them."""
    rows = []
    for each in benchmarks:
        what, info = each["name"].removeprefix("test_"), each["extra_info"]
        for unit in ("ratio_to_oracle", "microseconds_over_oracle"):
            if unit in info:
                median = _digits(1e3 * each["stats"]["median"])
                rows.append({"what": what, unit: _digits(info[unit]), "fused_milliseconds": median})
    columns = ("what", "ratio_to_oracle", "microseconds_over_oracle", "fused_milliseconds")
    return [{name: row.get(name) for name in columns} for row in rows]


def fuse(benchmarks: Sequence[Row]) -> list[Row]:
    """Stock projectors beside themselves fused: their time over ours, our errors and bytes."""
    rows = []
    columns = ("model", "what", "stock_over_fused", "error_over_stock", "saved_over_stock")
    for each in benchmarks:
        info = each["extra_info"]
        if "stock_over_fused" in info:
            model, _, what = each["name"].partition("[")[2].rstrip("]").rpartition("-")
            figures = _digits(info["stock_over_fused"]), _digits(info.get("error_over_stock")), None
            rows.append((model, what, *figures))
        elif "saved_bytes_over_stock" in info:
            saved = _digits(info["saved_bytes_over_stock"])
            rows.append(("Perception-LM, 1024 -> 256 tokens", "bytes kept", None, None, saved))
    return [dict(zip(columns, row, strict=True)) for row in rows]


def packed(benchmarks: Sequence[Row]) -> list[Row]:
    """Packs of images: their building, and their pooling beside a loop over the images."""
    rows = []
    for each in benchmarks:
        info = each["extra_info"]
        if each["name"].startswith(("test_build", "test_forward_beside_a_loop")):
            median = _digits(1e3 * each["stats"]["median"])
            shortest = _digits(1e3 * each["stats"]["min"])
            times = {"milliseconds": median, "shortest_milliseconds": shortest}
            over = _digits(info.get("loop_over_ours"))
            rows.append(
                {"what": each["name"].removeprefix("test_"), **times, "loop_over_ours": over}
            )
    return rows


def _digits(value: float | None) -> float | None:
    """Four of them: more is noise."""
    return None if value is None else float(f"{value:.4g}")


def _properties(junit: Path) -> Iterator[tuple[str, Row]]:
    """What tests recorded for us: the property ``counts`` or ``launches``, a row as JSON."""
    for each in ElementTree.parse(junit).iter("property"):
        name = each.get("name")
        if name in ("counts", "launches"):
            yield name, json.loads(each.get("value"))


def predictions(printed: str) -> Iterator[Row]:
    """The rows of the times that ``predict`` prints.

    Raises:
        ValueError: there is no such table.
    """
    head, *lines = _table(printed, r"chip +config")
    names = [
        f"{head[i - 1]}_over_ours" if name == "gain" else _PREDICTED.get(name, name)
        for i, name in enumerate(head)
    ]
    return (dict(zip(names, line, strict=True)) for line in lines)


def decisions(printed: str) -> Iterator[Row]:
    """The rows of what "auto" takes that ``predict`` prints.

    Raises:
        ValueError: there is no such table.
    """
    _, *lines = _table(printed, r"chip +images")
    ways = ("fused_us", "composed_us", "eager_us", "auto")
    names = [
        "chip",
        "images",
        *(f"{verb}_{way}" for verb in ("forward", "backward") for way in ways),
    ]
    return (dict(zip(names, line, strict=True)) for line in lines)


def _table(printed: str, head: str) -> list[list[str]]:
    """The cells of the lines from the one that begins with ``head`` to the next empty one."""
    found = re.search(rf"^{head}.*?(?=^$|\Z)", printed, re.M | re.S)
    if found is None:
        raise ValueError("predict printed no table of chips")
    return [re.split(r"\s{2,}", line.strip()) for line in found[0].splitlines()]


def _csv(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write(path: Path, content: str | bytes) -> None:
    """All of it or nothing: whoever reads ``path`` meanwhile sees the file before."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)
