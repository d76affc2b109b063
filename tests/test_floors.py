"""The house of docs/design.md: no import runs upward, the core knows no framework, files stay small."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import permjax.tree

pytestmark = pytest.mark.fast

ROOT = Path(permjax.tree.__file__).parent

CORE = {"tree", "files", "symmetry", "permutation", "plan", "action", "steps"}
METHODS = {"match", "merge", "lmc", "lora"}
GROUND = {"nets", "train", "io", "data", "config", "figures", "report", "parallel"}
WINGS = {"reversal", "kge", "edit"}
ROOF = {"experiments", "cli", "__init__", "__main__"}

MAY_IMPORT = {
    **dict.fromkeys(CORE, CORE),
    **dict.fromkeys(METHODS, CORE | METHODS | {"io", "parallel"}),
    **dict.fromkeys(GROUND, CORE | GROUND),
    **{wing: CORE | METHODS | GROUND | {wing} for wing in WINGS},
    **dict.fromkeys(ROOF, CORE | METHODS | GROUND | WINGS | ROOF),
}
FLAX_ONLY_IN = {"nets"}

FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = ("permjax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(nodes) -> set[str]:
    """Full names of what the nodes import; `from a import b` counts as `a.b`, which may be a module or not."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def everywhere(path: Path) -> set[str]:
    return imports(ast.walk(ast.parse(path.read_text())))


@pytest.fixture(scope="module")
def imported():
    return {path: everywhere(path) for path in FILES}


def test_every_room_has_its_floor():
    rooms = {room_of(path) for path in FILES}
    assert not CORE - rooms
    assert rooms <= MAY_IMPORT.keys(), "name the floor of a new room in this test and in docs/design.md"


def test_no_import_runs_upward_and_no_wing_imports_another(imported):
    wrong = [
        f"{module_of(path)} imports {name}"
        for path, names in imported.items()
        for name in names
        if name.startswith("permjax.") and name.split(".")[1] not in MAY_IMPORT.get(room_of(path), set())
    ]
    assert wrong == []


def test_only_nets_know_flax(imported):
    users = {room_of(path) for path, names in imported.items() for n in names if n.split(".")[0] == "flax"}
    assert users <= FLAX_ONLY_IN


def test_no_file_imports_itself_by_a_detour():
    modules = {module_of(path): path for path in FILES}
    graph = {
        module: {
            target
            for name in imports(ast.parse(path.read_text()).body)
            for target in (name, name.rpartition(".")[0])
            if target in modules and target != module and room_of(modules[target]) != "__init__"
        }
        for module, path in modules.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)


def test_sub_packages_export_nothing():
    inits = [path for path in FILES if path.name == "__init__.py" and path.parent != ROOT]
    assert [module_of(path) for path in inits if path.read_text().strip()] == []
    assert {path.parent for path in FILES} - {ROOT} == {path.parent for path in inits}


def test_no_file_is_longer_than_450_lines():
    assert {module_of(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 450} == {}


def test_no_annotation_is_turned_into_text_and_no_checker_is_imported(imported):
    names = set().union(*imported.values())
    assert "__future__.annotations" not in names
    assert not {name for name in names if name.split(".")[0] == "beartype"}


def test_importing_the_public_face_imports_no_framework():
    found = "import sys, permjax; print(*sorted({'flax', 'torch', 'transformers', 'tokenizers'} & {*sys.modules}))"
    run = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
