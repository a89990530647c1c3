"""Which results does README show? Those of the report in results/cpu, written by this script.

python -m deco_kernels report --out benchmarks/results/cpu && python benchmarks/readme.py
"""

import csv
import re
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results" / "cpu"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->"
OURS = "ours-eager"  # the fused projector, on a CPU

Row = dict[str, str]


def rows(name: str) -> list[Row]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def by_case(name: str) -> dict[str, dict[tuple[str, str], Row]]:
    """For each shape, its row of each mode and provider."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows(name):
        found.setdefault(row["shape"], {})[row["mode"], row["provider"]] = row
    return found


def table(head: list[str], lines: list[list[str]]) -> str:
    cells = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), 100, break_on_hyphens=False)


def memory() -> str:
    lines = []
    for found in by_case("memory.csv").values():
        line = [found["step-frozen", "eager"]["sizes"]]
        for mode in ("step-frozen", "step-trained"):
            eager, ours = (int(found[mode, who]["saved_bytes"]) for who in ("eager", OURS))
            line += [f"{eager:,}", f"**{ours:,}** ({ours / eager:.2f})"]
        lines.append(line)
    head = ["", "frozen tower: eager", "fused", "trained tower: eager", "fused"]
    return table(head, lines)


def speed() -> str:
    def ratio(row: Row | None) -> str:
        if row is None:
            return "not measured"
        median, *ends = (
            float(row[f"ratio_{which}"]) for which in ("to_eager", "lowest", "highest")
        )
        return f"{median:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"

    lines = []
    for found in by_case("speed.csv").values():
        line = [next(iter(found.values()))["sizes"]]
        for mode in ("step-frozen", "forward"):
            line += [ratio(found.get((mode, who))) for who in (OURS, "eager")]
        lines.append(line)
    head = ["", "training step: fused / eager", "eager / eager", "forward: fused / eager"]
    return table([*head, "eager / eager"], lines)


def projector() -> str:
    found = rows("projector.csv")
    steps = [float(row["ratio_to_oracle"]) for row in found if row["ratio_to_oracle"]]
    (host,) = (row for row in found if row["microseconds_over_oracle"])
    fused, more = 1e3 * float(host["fused_milliseconds"]), float(host["microseconds_over_oracle"])
    return paragraph(
        "One LLaVA-1.5 image, 144 or 64 tokens, frozen or trained tower, 10 rounds each: a step",
        f"takes {min(steps):.2f} to {max(steps):.2f} of the plain projector's time. A forward of",
        f"tiny tensors, all of it host time, takes {fused:.0f} µs, about",
        f"{fused / (fused - more):.1f} times the plain one's.",
    )


def fuse() -> str:
    found: dict[str, dict[str, Row]] = {}
    for row in rows("fuse.csv"):
        found.setdefault(row["model"], {})[row["what"]] = row
    lines = [
        [
            model,
            *(f"**{float(each[what]['stock_over_fused']):.2f}**" for what in ("forward", "step")),
            f"{float(each['forward']['error_over_stock']):.2f}",
        ]
        for model, each in found.items()
    ]
    times = ("forward: stock / fused", "training step: stock / fused")
    return table(["", *times, "error: fused / stock"], lines)


def kept() -> str:
    (row,) = (row for row in rows("fuse.csv") if row["saved_over_stock"])
    return f"{float(row['saved_over_stock']):.2f}"


def packed() -> str:
    found = {row["what"]: row for row in rows("packed.csv")}

    def over(layout: str, channels: int) -> str:
        modes = ("adaptive", "bilinear", "merge")
        names = (f"forward_beside_a_loop[{layout}-{mode}-{channels}]" for mode in modes)
        return "{:.1f}, {:.1f} and {:.1f}".format(
            *(float(found[n]["loop_over_ours"]) for n in names)
        )

    build = [
        float(found[f"build[known sizes-{how}]"]["milliseconds"]) for how in ("target", "merge")
    ]
    return paragraph(
        "**Packed images.** 64 images of 64 sizes, adaptive or bilinear to 12x12, or by 2x2: where",
        "a loop over the images copies their tokens channels first, as LLaVA-NeXT does, it takes",
        f"{over('copies', 256)} times as long as one pack with 256 channels, and",
        f"{over('copies', 1024)} times with 1024. On views of the tokens it takes",
        f"{over('views', 256)}, and {over('views', 1024)} times: there memory is the limit.",
        f"To build a pack of 256 images of known sizes takes {build[0]:.1f} ms to one target,",
        f"{build[1]:.1f} ms by a merge factor.",
    )


def counts() -> str:
    counted, launches = rows("counts.csv"), rows("launches.csv")
    names = [name.removeprefix("model_") for name in counted[0] if name.startswith("model_")]
    off = sum(row[f"model_{n}"] != row[f"executed_{n}"] for row in counted for n in names)
    steps = ", ".join(f"{r['forward']} + {r['backward']} ({r['tower']} tower)" for r in launches)
    kernels = len({row["kernel"] for row in counted})
    return paragraph(
        f"**Counts.** In {len(counted)} launches of {kernels} kernels, executed as PTX on the CPU,",
        "the cost model's bytes read, bytes written, sectors and tensor-core instructions differ",
        f"in {off} of {len(counted) * len(names)} numbers. Launches of a training step of two",
        f"layers, forward + backward, ours and cuBLAS's and one sum: {steps}.",
    )


def predicted() -> str:
    shipped = [row for row in rows("predicted.csv") if row["config"] == "shipped"]

    def gains(name: str) -> list[str]:
        return [row[name] if float(row[name]) >= 1 else f"**{row[name]}**" for row in shipped]

    lines = [
        ["pool + linear + GELU fused, µs", *(row["fused_us"] for row in shipped)],
        ["pool, then cuBLASLt, over fused", *gains("pool+Lt_over_ours")],
        ["training step of two layers, eager over ours", *gains("eager_over_ours")],
    ]
    return table(["", *(row["chip"] for row in shipped)], lines)


def decisions() -> str:
    """What "auto" takes for forward and backward, by number of images and chip."""
    found: dict[str, list[str]] = {}
    for row in rows("auto.csv"):
        ways = row["forward_auto"], row["backward_auto"]
        cell = ways[0] if ways[0] == ways[1] else " / ".join(ways)
        cell = cell if cell == "fused" else f"**{cell}**"
        found.setdefault(f"images: {row['images']}", []).append(cell)
    chips = dict.fromkeys(row["chip"] for row in rows("auto.csv"))
    return table(["", *chips], [[name, *cells] for name, cells in found.items()])


def region() -> str:
    """What stands between the two marks."""
    some = rows("speed.csv")[0]
    return f"""\
On a CPU, by `python -m deco_kernels report --out benchmarks/results/cpu`: [the whole
report](benchmarks/results/cpu/report.md). Its `benchmarks.json` has every provider's `extra_info`.

**Bytes kept for backward**, bfloat16, without parameters, by saved-tensor hooks:

{memory()}

**Time beside eager's**, {some["dtype"]}, {some["device"]}: the median of three rounds in
alternation, and their range; eager beside itself is the noise. On a CPU both run torch's operators,
so there is nothing to gain:

{speed()}

{projector()}

**Models that pool after their MLP**, `deco_kernels.fuse` beside the stock module, float32, one
image or clip on the same CPU: here there is something to gain, as the last product is done on
pooled tokens only, and VideoLLaMA 3's loop over images is one pooling. Perception-LM's projector
keeps {kept()} of the stock one's bytes for backward. Errors are the output's against float64, root
mean square: to average outputs averages their rounding too, so a product of averaged tokens may err
more, in float32 at most √window times as much.

{fuse()}

{packed()}

{counts()}

## What is predicted

Speed on a GPU. `python -m deco_kernels predict` prints microseconds for seven chips by a roofline,
each of its assumptions (a flag of the command), and at which value of it the gain is gone. The
bytes, sectors and tensor-core instructions that it works with are those of the executed PTX
(`pytest tests/tuning/test_model.py`); its times are not measured. By default, at [64, 576, 1024] →
[64, 144, 4096] and bfloat16, with products at 70 % of the dense peak, DRAM at 85 %, and 40 bytes a
clock from L2 to each SM:

{predicted()}

**Where fusion does not pay**, by the same model, for images of 576 → 144 tokens and two layers,
1024 → 4096 → 4096 channels, forward of the first / backward of the second where they differ;
"composed" is our pool, cuBLAS, and one elementwise kernel, and `backend="auto"` takes it there:

{decisions()}

"""


def main() -> None:
    text = README.read_text()
    if not re.search(f"{BEGIN}.*{END}", text, re.S):
        raise SystemExit(f"README.md has no region between {BEGIN.strip()} and {END}")
    head, _, rest = text.partition(BEGIN)
    if "**Complete.**" not in (RESULTS / "report.md").read_text():
        raise SystemExit(f"{RESULTS} holds no complete report: see its report.md")
    try:
        new = region()
    except (KeyError, ValueError, OSError) as error:
        raise SystemExit(f"{RESULTS} holds no whole report, run it again: {error!r}") from error
    README.write_text(f"{head}{BEGIN}{new}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
