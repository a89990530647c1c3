"""Is there one room for each question, and does nothing import upward?"""

import ast
import itertools
import re
from pathlib import Path

import pytest

from deco_kernels.__main__ import COMMANDS
from deco_kernels.host.private import FEATURES

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "deco_kernels"  # the sources: what is installed has csrc/ in it
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top: a room imports from those before it.
ROOMS = [
    "reference",
    "host",
    "stencil",
    "kernels",
    "tuning",
    "backends",
    "ops",
    "functional",
    "projector",
    "integrations",
    "tools",
]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The rooms that a file imports from, anywhere in it."""
    package = ["deco_kernels", *file.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*home, *filter(None, [node.module])])
            modules = [f"{module}.{name.name}" for name in node.names]
        else:
            continue
        parts = [module.split(".") for module in modules]
        found |= {part[1] for part in parts if part[0] == "deco_kernels" and len(part) > 1}
    return found - {"__version__"}


def test_every_entry_is_a_room():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    beside = {"__init__", "__main__", "py.typed", "__pycache__"}
    built = {name for name in entries if name.startswith("_deco_kernels_C")}
    assert entries - beside - built == set(ROOMS)
    assert len(ROOMS) <= 11


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_imports_upward(room):
    below = set(ROOMS[: ROOMS.index(room) + 1])
    for file in FILES:
        if room_of(file) == room:
            assert imported(file) <= below, file


def test_the_library_imports_no_tool():
    assert "tools" not in imported(PACKAGE / "__init__.py")
    assert imported(PACKAGE / "__main__.py") <= {"tools"}


def test_modules_are_imported_by_name_in_few_places():
    """What those import, the tests above do not see; ``test_light`` does."""
    calls = re.compile(r"\b(import_module|__import__|run_module|run_path)\(")
    library = [file for file in FILES if room_of(file) != "tools"]
    places = {file.name for file in library if calls.search(file.read_text(encoding="utf-8"))}
    assert places == {"__main__.py", "triton.py", "library.py", "toolchain.py"}


def test_every_tool_is_a_command_or_below_several():
    tools = {path.stem for path in (PACKAGE / "tools").iterdir()} - {"__init__", "__pycache__"}
    assert tools == {*COMMANDS, "arguments", "measure"}


def test_no_two_names_differ_by_a_letter_or_an_ending():
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert similar("check", "checks")
    assert similar("measure", "measuring")
    assert not similar("pool", "pool_linear")
    pairs = {pair for pair in itertools.combinations(sorted(names), 2) if similar(*pair)}
    assert pairs == {("tune", "tuning")}  # the command and its room


def similar(a: str, b: str) -> bool:
    def stem(word: str) -> str:
        return re.sub(r"(s|es|e|er|ed|ing|ion|ions)$", "", word)

    if stem(a) == stem(b):
        return True
    short, long = sorted((a, b), key=len)
    if len(short) == len(long):
        return sum(x != y for x, y in zip(a, b, strict=True)) == 1
    return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def test_no_file_is_long():
    files = [*FILES, *REPOSITORY.glob("tests/*/*.py"), *REPOSITORY.glob("benchmarks/*.py")]
    long = {file.name: n for file in files if (n := len(file.read_text().splitlines())) > 400}
    assert long.keys() <= {"team.py"}  # a machine's instructions, one after another


def private_names(file: Path) -> set[str]:
    """Names with an underscore, of attributes and imports, that this package does not define."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            found |= {
                part
                for name in node.names
                for part in f"{module}.{name.name}".split(".")
                if module.startswith("torch") or name.name.startswith("torch")
            }
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & TORCH
    return {name for name in found if re.match(r"_(?!_)", name)}


TORCH = {path.rpartition(".")[2] for needs in FEATURES.values() for path in needs.names}
NAMED_TUPLES = {"_replace", "_asdict", "_fields"}


def defined() -> set[str]:
    """Private names that this package defines: functions, attributes of self, slots, variables."""
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def test_torchs_private_names_are_in_one_file():
    own = defined() - TORCH
    for file in FILES:
        if file.name != "private.py":
            of_triton = {"_active"} if file.parent.name == "compile" else set()
            assert not private_names(file) - own - NAMED_TUPLES - of_triton, file


def test_contributing_lists_torchs_private_names():
    told = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for needs in FEATURES.values():
        for path, since in needs.names.items():
            assert f"`{path}` {since}" in told
