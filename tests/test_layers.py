"""No import goes up, and no two modules import each other."""

import ast
import importlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import planearly

ROOT = Path(planearly.__file__).parent
LAYERS = ["errors", "units", "files processes progress yamltext", "company", "storage", "parallel",
          "sharding", "tensors engine", "keys", "checks", "config", "methods", "data", "cluster",
          "model", "train", "evaluate", "generate", "cost", "report", "export", "plan", "stages",
          "study", "studies", "usage", "api", "cli"]
"""From the ground up; modules of one line do not import each other."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
STRANGERS = {"model": {"data", "cluster"}}
"""What lies below a room and is still none of its business."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py") if name_of(path)}


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, also inside functions; not for types alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "planearly":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                whole = f"{base}.{alias.name}".strip(".")
                found.add(whole if whole in MODULES else base)
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[2] for alias in node.names
                         if alias.name.startswith("planearly."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text("utf-8")))
    return {name for name in found if name in MODULES}


def test_every_room_has_its_place():
    assert {name.split(".")[0] for name in MODULES} == RANK.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_upwards(module):
    room = module.split(".")[0]
    for imported in imports(MODULES[module]):
        other = imported.split(".")[0]
        assert RANK[other] < RANK[room] or other == room, f"{module} imports {imported}"
        assert other not in STRANGERS.get(room, ()), f"{module} imports {imported}"


def test_no_circles():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"modules import each other: {' -> '.join(circle.args[1])}")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_is_imported(module):
    if module == "model.kernels":
        pytest.importorskip("triton", reason="of torch's builds for GPUs")
    importlib.import_module(f"planearly.{module}")


def test_every_package_says_what_it_is_for():
    for path in ROOT.rglob("__init__.py"):
        assert (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").strip(), path


def test_two_modules_call_torch_distributed():
    users = {name for name, path in MODULES.items()
             if "torch.distributed" in path.read_text("utf-8")}
    assert users == {"parallel", "sharding"}
