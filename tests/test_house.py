"""The structure of the package: who may import whom, how long a file may be, what doors are."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from dino_kit.config.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dino_kit"

# The floor of every module or package; a longer name wins over a shorter one.
FLOORS = {
    "dino_kit.config": 0,
    "dino_kit.recipes": 0,
    "dino_kit.errors": 0,
    "dino_kit.files": 0,
    "dino_kit.shards": 0,
    "dino_kit.journal": 0,
    "dino_kit.locks": 0,
    "dino_kit.distributed": 0,
    "dino_kit.log": 0,
    "dino_kit.randomness": 0,
    "dino_kit.data": 1,
    "dino_kit.schedules": 1,
    "dino_kit.ema": 1,
    "dino_kit.heads": 1,
    "dino_kit.batch_norm": 1,
    "dino_kit.sharding": 1,
    "dino_kit.normalize": 1,
    "dino_kit.batch_norm": 1,
    "dino_kit.geometry": 1,
    "dino_kit.backbones": 2,
    "dino_kit.objectives": 2,
    "dino_kit.data.inspection": 2,
    "dino_kit.data.loader": 2,
    "dino_kit.data.bad_images": 2,
    "dino_kit.data.statistics": 2,
    "dino_kit.training": 2,
    "dino_kit.search": 2,
    "dino_kit.figures": 2,
    "dino_kit.patch_figures": 3,
    "dino_kit.attention_page": 2,
    "dino_kit.backbones.build": 3,
    "dino_kit.student_teacher": 3,
    "dino_kit.proposal": 3,
    "dino_kit.checking": 3,
    "dino_kit.weights": 4,
    "dino_kit.features": 4,
    "dino_kit.resume": 4,
    "dino_kit.training.learner": 5,
    "dino_kit.training.engine": 5,
    "dino_kit.training.run": 5,
    "dino_kit.evaluators": 5,
    "dino_kit.report": 5,
    "dino_kit.preparation": 5,
    "dino_kit.assemble": 6,
    "dino_kit.bench": 6,
    "dino_kit.cluster": 6,
    "dino_kit.evaluation": 6,
    "dino_kit.reporting": 6,
    "dino_kit.commands": 7,
    "dino_kit.cli": 8,
    "dino_kit.__main__": 9,
    "dino_kit": 9,
}
# Among the modules of the ground floor: whom each may import.
GROUND = {
    "dino_kit.errors": set(),
    "dino_kit.randomness": set(),
    "dino_kit.distributed": {"dino_kit.errors"},
    "dino_kit.log": {"dino_kit.distributed"},
    "dino_kit.files": {"dino_kit.errors", "dino_kit.log"},
    "dino_kit.shards": {"dino_kit.distributed", "dino_kit.errors", "dino_kit.files"},
    "dino_kit.locks": {"dino_kit.distributed", "dino_kit.errors", "dino_kit.log"},
    "dino_kit.journal": {"dino_kit.log"},
    "dino_kit.config": {"dino_kit.errors", "dino_kit.files", "dino_kit.log"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Modules of the package that ``name`` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are written in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return {module for module in found if module.split(".")[0] == "dino_kit"} - {name}


def longest(name: str, table) -> str:
    fitting = [key for key in table if name == key or name.startswith(key + ".")]
    return max(fitting, key=len)


def package(name: str) -> str:
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_lower_floors_or_its_own_package(name):
    """Or from the package that its own is a part of."""
    floor = FLOORS[longest(name, FLOORS)]
    for other in imports(name):
        home = package(other)
        own_package = home != "dino_kit" and f"{package(name)}.".startswith(f"{home}.")
        if floor == 0 and FLOORS[longest(other, FLOORS)] == 0:
            here, there = longest(name, GROUND), longest(other, GROUND)
            assert here == there or there in GROUND[here], f"{name} imports {other}"
        elif floor == 7:
            assert not other.startswith("dino_kit.commands."), f"the command {name} imports {other}"
            assert FLOORS[longest(other, FLOORS)] < 7, f"{name} imports {other}"
        else:
            lower = FLOORS[longest(other, FLOORS)] < floor
            assert lower or own_package, f"{name} (floor {floor}) imports {other}"


def test_imports_have_no_cycle():
    graph = {name: imports(name) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_evaluators_and_engine_do_not_know_each_other():
    for name in MODULES:
        if name.startswith("dino_kit.evaluators"):
            assert not any(other.startswith("dino_kit.training") for other in imports(name))
        if name.startswith("dino_kit.training"):
            assert not any(other.startswith("dino_kit.evaluators") for other in imports(name))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_file_is_short_and_says_what_it_is_for(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    if MODULES[name].name != "__init__.py" or name == "dino_kit":
        assert ast.get_docstring(ast.parse(text))
    else:
        assert text == ""


@pytest.mark.parametrize("module", ["cli", "log", "files", "distributed", "errors", "config.train"])
def test_the_ground_floor_and_the_cli_do_not_import_torch(module):
    program = f"import dino_kit.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_root_is_lazy():
    program = "import dino_kit, sys; dino_kit.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_train_imports_neither_faiss_nor_submitit():
    program = (
        "import dino_kit.commands.train, sys;"
        "sys.exit(bool({'faiss', 'submitit', 'timm', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def doors():
    return sorted([*(ROOT / "eval").glob("*.py"), *(ROOT / "launch").glob("*.py")])


def command_of(door: Path) -> str:
    part = f"launch {door.stem}"
    return part if part in COMMANDS and door.parent.name == "launch" else door.stem


@pytest.mark.parametrize("door", doors(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_door_is_a_docstring_and_a_call(door):
    text = door.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) < 40
    assert f"dino-kit {command_of(door)}" in ast.get_docstring(tree)
    assert not any(
        isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.Assign)
        for node in ast.walk(tree)
    )
    assert not (door.parent / "__init__.py").exists()
    # No path surgery: nothing is imported but the way in, and nothing of sys touched but two names.
    imported = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported == ["import sys", "from dino_kit.cli import main"]
    of_sys = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert of_sys == {"exit", "argv"}


def test_no_door_hides_a_library():
    """A script's folder comes first on the path, so ``launch/submitit.py`` would be imported."""
    libraries = set(metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert not {door.stem for door in doors()} & libraries


@pytest.mark.parametrize("door", doors(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_door_has_the_help_of_its_command(door):
    behind = subprocess.run([sys.executable, door, "--help"], capture_output=True, text=True)
    command = subprocess.run(
        [sys.executable, "-m", "dino_kit", *command_of(door).split(), "--help"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert behind.returncode == command.returncode == 0
    assert behind.stdout == command.stdout != ""


def test_every_command_of_the_evaluators_has_a_door():
    assert {door.stem for door in doors()} >= {"knn", "linear", "attention", "train", "slurm"}
