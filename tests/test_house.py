"""The house of docs/design.md: arrows point down, there is no circle, few files stand at the door, and every room says what it is for."""

import ast
import subprocess
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "openvision3"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("experiments",),
    ("estimate", "doctor", "export"),
    (
        "train.pretrain",
        "train.recipes",
        "train.config",
        "train.held_out",
        "train.latent_decoder",
        "train.decoder_config",
        "train.released",
        "train.trial",
        "train.encode_latents",
        "recaption",
        "search",
        "generate",
        "understand",
    ),
    ("train", "evaluate"),
    ("adapters",),
    ("pipeline",),
    ("hub",),
    ("evaluate.protocol",),
    ("networks",),
    ("data", "model"),
    ("report", "fetch"),
    ("draws", "device", "distributed", "files", "progress", "settings", "contents"),
    ("",),
)
"""From the roof to the ground. A module belongs to the longest prefix that names it; "" is openvision3/__init__.py."""


def modules() -> dict[str, Path]:
    """{dotted name within the package: file}; a room's own name stands for its __init__.py."""
    return {str(path.relative_to(PACKAGE))[:-3].replace("/", ".").removesuffix("__init__").rstrip("."): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def arrows() -> dict[str, frozenset[str]]:
    """{module: modules of ours that it imports, at its head or within a function}; what only a type checker reads is left out."""
    named = modules()
    seen: dict[str, set[str]] = {name: set() for name in named}
    for name, path in named.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing_only = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING" and name == ""
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in typing_only or (node.module or "").split(".")[0] != "openvision3":
                continue
            source = (node.module or "").removeprefix("openvision3").removeprefix(".")
            for alias in node.names:
                whole = f"{source}.{alias.name}".removeprefix(".")
                seen[name].add(whole if whole in named else source)
    return {name: frozenset(targets - {name}) for name, targets in seen.items()}


def floor(module: str) -> tuple[int, str]:
    """(height counted from the roof, the name in FLOORS that it falls under)."""
    best = max(
        ((name, number) for number, names in enumerate(FLOORS) for name in names if module == name or (name and module.startswith(f"{name}."))),
        key=lambda pair: len(pair[0]),
        default=None,
    )
    assert best is not None, f"{module} stands on no floor; give it a place in FLOORS"
    return best[1], best[0]


def test_arrows_point_down_and_rooms_of_one_floor_do_not_know_each_other():
    up = set()
    for module, targets in arrows().items():
        for target in targets:
            (height, room), (below, other) = floor(module), floor(target)
            if below < height or (below == height and room.split(".")[0] != other.split(".")[0] and height != len(FLOORS) - 2):
                up.add((module, target))
    assert not up


def test_the_model_sees_tensors_only():
    """No file, network of others or run reaches it: they are handed in."""
    ground = ("model", "distributed", "draws", "settings")
    for module, targets in arrows().items():
        if module.split(".")[0] == "model":
            assert {target.split(".")[0] for target in targets} <= {*ground, ""}, module


def test_no_module_imports_itself_by_way_of_others():
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for target in sorted(arrows()[module]):
            visit(target)
        done.add(path.pop())

    for module in modules():
        visit(module)


def test_at_most_twelve_files_stand_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


ROOMS = sorted(str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_for_and_what_it_may_import(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert 1 <= len(text.partition("\n\n")[0].splitlines()) <= 3 and "may import" in text.lower()


def test_no_file_is_called_utils_and_none_is_empty():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem not in ("utils", "helpers", "misc", "common_utils") and path.read_text().strip(), path


@pytest.mark.parametrize(
    "test", sorted(str(path.relative_to(PACKAGE.parents[1] / "tests").parent) for path in (PACKAGE.parents[1] / "tests").rglob("test_*.py"))
)
def test_tests_stand_in_the_rooms_of_what_they_test(test):
    assert test in (".", "tools") or (PACKAGE / test).is_dir(), test


def test_no_tracked_file_is_a_link():
    """A link to a place of one machine, such as .venv, breaks `make setup` elsewhere."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=PACKAGE.parents[1], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []
