"""The rooms of the package: nothing is imported from above, and no two need each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "looped_jax"
# Each may import what stands before it. Programs are at the end and import no other program.
ORDER = (
    "errors", "files", "config", "cli", "runtime", "model", "resolve", "data", "plotting",
    "training", "planning", "inference", "evaluation", "tasks", "diagnostics",
    "experiments", "looped_jax", "programs",
)  # fmt: skip
PROGRAMS = ("train", "evaluate", "generate", "diagnose", "compare", "lr_find", "plan",
            "sweep")  # fmt: skip


def room(module):
    name = module.split(".")[1] if "." in module else "looped_jax"
    return "programs" if name in PROGRAMS else name


def imports():
    modules = {
        ".".join(("looped_jax", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for p in ROOT.rglob("*.py")
    }
    for path in ROOT.rglob("*.py"):
        name = ".".join(("looped_jax", *path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("looped_jax"):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield name.removesuffix(".__init__"), full if full in modules else node.module
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("looped_jax"):
                        yield name.removesuffix(".__init__"), alias.name


def test_no_import_goes_upward():
    upward = [
        f"{one} imports {other}"
        for one, other in imports()
        if room(one) != room(other) and ORDER.index(room(one)) < ORDER.index(room(other))
    ]
    assert not upward


def test_programs_import_no_program():
    doors = [
        f"{one} imports {other}"
        for one, other in imports()
        if room(one) == room(other) == "programs" and one != other
    ]
    assert not doors


def test_the_top_sheet_has_few_rooms():
    entries = [p for p in ROOT.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 25
