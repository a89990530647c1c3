"""How does it read? A page of Markdown: what was done, and a section for each kind of step."""

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .collect import QUANTITIES, Results, Row, fuse, memory, packed, projector, speed
from .pictures import Pictures
from .plan import Step

TITLE = "# deco_kernels report"
TAIL = 15  # lines shown of a step that failed
SECTIONS = {  # by the step, or by what its name begins with
    "info": "Machine",
    "check": "Right or wrong: output and every gradient against float64",
    "gpu_tests": "Tests on the GPU",
    "counts": "Counted without a GPU: the cost model beside the executed PTX",
    "tune": "",  # the step's own title says whether this is a plan only
    "speed": "Measured: time beside eager's",
    "memory": "Measured: bytes kept for backward",
    "projector": "Measured: the fused projector beside the plain one, as the host sees it",
    "fuse": "Measured: stock projectors that pool after their MLP, beside themselves fused",
    "packed": "Measured: packs of images of different sizes",
    "predict": "Predicted, not measured: times by the roofline model",
}


@dataclass
class Outcome:
    """What came of a step; ``note`` says why it was not run, or what went wrong."""

    state: str = "waiting"  # running, done, failed, interrupted, not measured
    seconds: float | None = None
    note: str = ""
    output: str = ""

    @classmethod
    def before(cls, step: Step) -> "Outcome":
        return cls("not measured", note=step.reason) if step.reason else cls()

    def interrupt(self) -> None:
        """The step that would run next will not."""
        if self.state == "waiting":
            self.state, self.note = "not measured", "the report was interrupted before"

    def __str__(self) -> str:
        return f"{self.state}: {self.note}" if self.note else self.state


Outcomes = dict[Step, Outcome]


def table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, the first ``left`` columns aligned to the left."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    cells = [["" if cell is None else str(cell) for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in cells]


def render(
    verdict: str, load: str, outcomes: Outcomes, results: Results, pictures: Pictures
) -> str:
    """The whole page; ``load`` says how busy the machine was."""
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [TITLE, "", f"**{verdict[0].upper()}{verdict[1:]}.** Written {now:%Y-%m-%d %H:%M} UTC."]
    wanted = "deco_kernels", "python", "torch", "triton", "CUDA"
    versions = [f"{name} {results.info[name]}" for name in wanted if name in results.info]
    devices = [text for name, text in results.info.items() if name.startswith("device ")]
    if devices:
        lines += ["", f"Device: {devices[0]}; {load}. Versions: {'; '.join(versions)}."]
    lines += ["", *_summary(outcomes)]
    if pictures.missing or pictures.error:
        lines += ["", f"Not drawn: {pictures.missing or pictures.error}."]
    for name, title in SECTIONS.items():
        chosen = {s: each for s, each in outcomes.items() if s.name.partition("_")[0] == name}
        chosen = chosen or {s: each for s, each in outcomes.items() if s.name == name}
        if chosen:
            title = title or next(iter(chosen)).title
            lines += ["", f"## {title}", "", *_outcomes(chosen)]
            lines += _BODIES[name]("\n".join(o.output for o in chosen.values()), results)
            lines += [line for each in pictures.of(name) for line in ("", f"![{title}]({each})")]
    return "\n".join(lines) + "\n"


def _summary(outcomes: Outcomes) -> list[str]:
    rows = [
        (step.title, each, "" if each.seconds is None else f"{each.seconds:.0f}", step.limit)
        for step, each in outcomes.items()
    ]
    return table(("step", "outcome", "seconds", "limit"), rows, left=2)


def _outcomes(chosen: Outcomes) -> list[str]:
    """The command of each step, and the end of what it printed if it failed."""
    lines: list[str] = []
    for step, each in chosen.items():
        if each.state in ("not measured", "waiting"):
            lines += [f"**{each.state.capitalize()}**: {each.note or 'not yet its turn'}.", ""]
            continue
        state = "" if each.state == "done" else f" **{str(each).capitalize()}**."
        lines += [f"[`{step}`]({step.log}){state}", ""]
        if each.state == "failed" and _BODIES.get(step.name) is not _all_of_it:
            lines += [*_code(each.output.rstrip().splitlines()[-TAIL:]), ""]
    return lines[:-1]


def _code(lines: Iterable[str]) -> list[str]:
    return ["```", *lines, "```"]


def _all_of_it(output: str, results: Results) -> list[str]:
    text = output.strip()
    return ["", *_code(text.splitlines())] if text else []


def _check(output: str, results: Results) -> list[str]:
    right, wrong = (len(re.findall(rf"^{word} ", output, re.M)) for word in ("ok", "FAIL"))
    lines = output.strip().splitlines()
    return ["", f"{right} cases right, {wrong} wrong: {lines[-1]}"] if right or wrong else []


def _passed(output: str) -> list[str]:
    found = re.findall(r"^\d+ \w+.* in .*s.*$", output, re.M)
    return ["", f"{found[-1]}."] if found else []


def _counts(output: str, results: Results) -> list[str]:
    """Sums over the shapes; the file has each."""
    lines = _passed(output)
    kernels: dict[str, list[Row]] = {}
    for row in results.counts:
        kernels.setdefault(row["kernel"], []).append(row)
    rows = []
    for kernel, each in kernels.items():
        sums = [sum(row[f"executed_{name}"] for row in each) for name in QUANTITIES]
        off = [abs(row[f"executed_{n}"] - row[f"model_{n}"]) for row in each for n in QUANTITIES]
        rows.append((kernel, len(each), *(f"{value:,}" for value in sums), max(off)))
    if rows:
        head = ("kernel", "launches", "bytes read", "bytes written", "sectors", "mma instructions")
        head = (*head, "largest difference to the model")
        lines += ["", *table(head, rows), "", "Sums over the launches, sm_80: [all](counts.csv)."]
    if results.launches:
        launched = [tuple(row.values()) for row in results.launches]
        head = ("tower", "launches of a forward", "of a backward")
        lines += ["", "Two layers, ours and torch's kernels together:", "", *table(head, launched)]
    return lines


def _speed(output: str, results: Results) -> list[str]:
    rows = speed(results.benchmarks)
    if not rows:
        return []
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["mode"] in ("forward", "step-frozen", "step-trained"):
            cases.setdefault((row["shape"], row["mode"]), {})[row["provider"]] = row
    lines = []
    for (shape, mode), found in cases.items():
        some = next(iter(found.values()))
        ratios = [_ratio(found.get(provider)) for provider in providers]
        lines.append((shape, mode, f"{some['eager_milliseconds']:.3g}", *ratios))
    head = ("shape", "mode", "eager, ms", *providers)
    first = rows[0]
    return [
        "",
        f"{first['dtype']} on {first['device']}. Time over eager's, taken in alternation: the"
        " median and the range of the rounds; eager over eager is the noise.",
        *("", *table(head, lines, left=2)),
        *("", "With backward alone, rates, share of the roofline, and memory: [all](speed.csv)."),
        *_left_out(providers, output),
        *_skipped(output),
    ]


def _left_out(providers: Sequence[str], output: str) -> list[str]:
    """What this report does not even ask for."""
    autotune = "compile-max-autotune"
    if autotune in providers or autotune in output:
        return []
    return ["", f"{autotune} takes minutes for each shape; `pytest benchmarks/` has it, and more."]


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['ratio_to_eager']:.2f} ({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})"


def _memory(output: str, results: Results) -> list[str]:
    rows = memory(results.benchmarks)
    if not rows:
        return []
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        found = cases.setdefault((row["shape"], row["mode"]), {})
        found[row["provider"]] = f"{row['saved_bytes']:,}"
    lines = [(*case, *(found.get(p) for p in providers)) for case, found in cases.items()]
    text = f"Exact bytes by saved-tensor hooks, {rows[0]['dtype']}, without parameters: [all]"
    text += "(memory.csv)."
    table_ = table(("shape", "mode", *providers), lines, left=2)
    return ["", text, "", *table_, *_skipped(output)]


def _skipped(output: str) -> list[str]:
    """What is not in the table, and why; by pytest's summary."""
    who: dict[str, dict[str, None]] = {}
    for provider, reason in re.findall(r"^SKIPPED .*?\.py:\d+: ([\w-]+): (.*)$", output, re.M):
        who.setdefault(reason, {})[provider] = None
    lines = [f"{', '.join(each)} ({why})" for why, each in who.items() if "eager" not in each]
    # Where eager is not measured, nobody is; of reasons that differ in a number, one will do.
    cases = {re.sub(r"\d+", "", why): why for why, each in who.items() if "eager" in each}
    lines += [f"cases such as: {why}" for why in cases.values()]
    return ["", "Not measured:", "", *(f"- {line}" for line in lines)] if lines else []


def _projector(output: str, results: Results) -> list[str]:
    rows = [
        (row["what"], row["ratio_to_oracle"], row["microseconds_over_oracle"])
        for row in projector(results.benchmarks)
    ]
    if not rows:
        return []
    head = ("what", "time over the oracle's", "µs more than the oracle")
    return ["", *table(head, rows), "", "[All](projector.csv)."]


def _fuse(output: str, results: Results) -> list[str]:
    rows = [tuple(row.values()) for row in fuse(results.benchmarks)]
    if not rows:
        return []
    text = (
        "In alternation, float32 on a CPU; a step is forward and backward with a trained tower."
        " Errors are those of the output against float64, root mean square."
    )
    ours = ("our error over stock's", "our bytes over stock's")
    head = ("model", "what", "stock's time over ours", *ours)
    return ["", text, "", *table(head, rows, left=2), "", "[All](fuse.csv)."]


def _packed(output: str, results: Results) -> list[str]:
    rows = [tuple(row.values()) for row in packed(results.benchmarks)]
    if not rows:
        return []
    text = (
        "256 images to build; 64 images of 8x8 to 40x40 tokens to pool to 12x12, or by 2x2 (merge),"
        " with 1024 or 256 channels. A loop pools views of the tokens, or copies channels first."
    )
    head = ("what", "median, ms", "shortest, ms", "time of a loop over the images, over ours")
    return ["", text, "", *table(head, rows), "", "[All](packed.csv)."]


def _predicted(output: str, results: Results) -> list[str]:
    rows = [
        tuple(row.values())
        for row in results.predicted
        if row.get("config", "shipped") == "shipped"
    ]
    if not rows:
        return []
    head = [name.replace("_us", ", µs").replace("_", " ") for name in results.predicted[0]]
    text = "With the shipped tiles. Other tiles: [predicted.csv](predicted.csv); what is assumed:"
    lines = ["", *table(head, rows, left=2), "", f"{text} [predict.txt](predict.txt)."]
    if results.auto:
        head = [name.replace("_us", ", µs").replace("_", " ") for name in results.auto[0]]
        told = 'What "auto" takes where `tune` has measured nothing, and why:'
        lines += ["", told, "", *table(head, [tuple(row.values()) for row in results.auto])]
    return lines


_BODIES: dict[str, Callable[[str, Results], list[str]]] = {
    "info": _all_of_it,
    "check": _check,
    "gpu_tests": lambda output, results: _passed(output),
    "counts": _counts,
    "tune": _all_of_it,
    "speed": _speed,
    "memory": _memory,
    "projector": _projector,
    "fuse": _fuse,
    "packed": _packed,
    "predict": _predicted,
}
