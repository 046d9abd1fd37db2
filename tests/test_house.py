"""How the code is laid out, checked on the code: imports go one way, few doors to the network, a short front door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distwd

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distwd"
FILES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTED = re.findall(
    r"^::: distwd\.(\w+)$", (ROOT / "docs/pages/reference/api.md").read_text(encoding="utf-8"), re.MULTILINE
)

# The law of imports. A room imports only from rooms of lines above its own; two rooms of one line do not know each other.
LAYERS = [
    ["errors", "checks", "_torch"],
    ["kernels", "sharding"],
    ["metrics", "groups"],
    ["step"],
    ["rules", "optimizers"],
    ["chain", "attach"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]

# Who may call a collective, and nobody else.
DOORS = {"sharding/collectives.py"}
COLLECTIVES = re.compile(
    r"(all_reduce|all_gather\w*|reduce_scatter\w*|broadcast\w*|barrier|monitored_barrier|gather\w*|scatter\w*|all_to_all\w*|"
    r"reduce|send|recv|isend|irecv|batch_isend_irecv|new_group|new_subgroups\w*|full_tensor|redistribute)"
)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path: Path) -> str:
    """The part of the package that a file belongs to: a folder, or a module at the top."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def units_imported(path: Path) -> set[str]:
    """The parts of distwd that a file imports, wherever in the file it does."""
    package = ("distwd", *path.relative_to(PACKAGE).parts[:-1])
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("distwd.")}


def level_of(unit: str) -> int:
    found = [level for level, units in enumerate(LAYERS) if unit in units]
    assert found, f"distwd/{unit} has no place in LAYERS; give it one, and docs/pages/project/architecture.md a line"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_imports_go_one_way(path):
    unit = unit_of(path)
    wrong = {other for other in units_imported(path) - {unit} if level_of(other) >= level_of(unit)}
    assert not wrong, f"{place_of(path)} imports {sorted(wrong)}, which is not below {unit}"


@pytest.mark.parametrize("path", [path for path in FILES if unit_of(path) == "kernels"], ids=place_of)
def test_kernels_import_torch_and_nothing_of_ours(path):
    assert units_imported(path) <= {"kernels", "_torch"}
    assert "distributed" not in path.read_text(encoding="utf-8"), "a kernel knows nothing of ranks"


def collectives_called(path: Path) -> set[str]:
    """Calls of torch.distributed's collectives, as `dist.x(...)` or by a name imported from torch.distributed."""
    imported, modules = set(), set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {
                alias.asname or alias.name for alias in node.names if alias.name.startswith("torch.distributed")
            }
    called = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and COLLECTIVES.fullmatch(node.attr) and ast.unparse(node.value) in modules:
            called.add(node.attr)
        elif isinstance(node, ast.Name) and node.id in imported and COLLECTIVES.fullmatch(node.id):
            called.add(node.id)
    return called


def test_only_the_doors_call_collectives():
    assert {place_of(path) for path in FILES if collectives_called(path)} == DOORS


def methods_called(path: Path) -> set[str]:
    return {
        node.func.attr
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_no_parameter_is_ever_gathered(path):
    assert "full_tensor" not in methods_called(path)


def test_the_front_door_is_sorted_and_as_documented():
    assert list(distwd.__all__) == sorted([*DOCUMENTED, "__version__"])
    assert all(hasattr(distwd, name) for name in distwd.__all__)


def test_every_public_name_is_ours():
    """What is public is ours, not something that was imported along the way."""
    assert all(getattr(distwd, name).__module__.split(".")[0] == "distwd" for name in DOCUMENTED)


IMPORT = """
import sys, threading, warnings
import torch, torch.distributed as dist

def world():
    return (
        dist.is_initialized(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.get_rng_state().tolist(), torch.cuda.is_initialized(), list(warnings.filters), threading.active_count(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
    )

before, modules = world(), set(sys.modules)
import distwd
assert world() == before, "importing distwd changed something outside of it"
new = {name.split(".")[0] for name in set(sys.modules) - modules}
print(sorted(new - {"distwd", "torch"} - set(sys.stdlib_module_names)))
# It takes several times as long as all the rest, and who trains on one device has none.
print("torch.distributed.tensor" in set(sys.modules) - modules)
"""


def test_importing_changes_nothing_else():
    ended = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:distwd", "-c", IMPORT],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    others, dtensors = ended.stdout.splitlines()
    assert others == "[]", "importing distwd brings in something else than torch"
    assert dtensors == "False", "importing distwd brings in DTensors"


MUTATORS = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def state_changed(path: Path) -> list[str]:
    """Where a function changes what the module holds: `global x`, `TABLE[k] = v`, `TABLE.update(...)`."""
    tree = tree_of(path)
    held = {
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"line {node.lineno}: global {', '.join(node.names)}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            if isinstance(node.func.value, ast.Name) and node.func.value.id in held:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if isinstance(node.value, ast.Name) and node.value.id in held:
                found.append(f"line {node.lineno}: {ast.unparse(node)} = ...")
    return found


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_no_module_holds_state_that_changes(path):
    assert state_changed(path) == []


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_no_cache_lives_longer_than_an_optimizer(path):
    """A functools.cache over tensors, meshes or groups keeps them alive, and outlives a process group.

    Some hold neither: what a compiler has made of a formula, which torch and Triton themselves keep for the process, and
    whether there is such a compiler.
    """
    text = path.read_text(encoding="utf-8")
    if number := {"kernels/compile.py": 3, "kernels/triton.py": 1}.get(place_of(path)):
        assert text.count("functools.cache") == number
        return
    assert not re.search(r"\b(lru_cache|functools\.cache|from functools import .*\bcache\b)", text)


SYNCS = {"item", "tolist", "numpy", "cpu"}
# What runs in a step. `.cpu()` and `.tolist()` have their place where a plan is built.
IN_A_STEP = (
    "kernels/",
    "metrics/",
    "step/coefficients.py",
    "step/step.py",
    "step/transform.py",
    "rules/",
    "optimizers/",
)
ONCE = ("metrics/replica_check.py", "step/start.py")  # in a first step that builds the plan


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if place_of(path).startswith(IN_A_STEP) and place_of(path) not in ONCE],
    ids=place_of,
)
def test_nothing_in_a_step_reads_a_tensor_on_the_host(path):
    assert methods_called(path) & SYNCS == set()


# What a machine with cards has: torch, and what the tests cannot do without.
EVERYWHERE = {"torch", "pytest", "hypothesis", "numpy", "distwd", "tests"}
PROGRAMS = [*(ROOT / "tests").glob("*.py"), *(ROOT / "launch").glob("bench*.py")]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_tests_and_benchmark_are_read_where_there_is_only_torch(path):
    """`pytest -m gpu` reads every test module before it chooses: one that asks for more at its top would stop all of them."""
    names: set[str] = set()
    for node in tree_of(path).body:
        for one in node.body if isinstance(node, (ast.Try, ast.If)) else [node]:
            if isinstance(one, ast.Import):
                names |= {alias.name.split(".")[0] for alias in one.names}
            elif isinstance(one, ast.ImportFrom):
                names.add((one.module or "").split(".")[0])
    beside = {other.stem for other in path.parent.glob("*.py")}
    assert names - EVERYWHERE - beside - set(sys.stdlib_module_names) == set()


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", distwd.__version__)
    written = [path for path in FILES if re.search(r"__version__\s*=", path.read_text(encoding="utf-8"))]
    assert [place_of(path) for path in written] == ["__init__.py"]
    assert "\nversion =" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"## {distwd.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_torch_is_the_only_dependency():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (dependencies,) = re.findall(r"^dependencies = \[(.*)\]$", text, re.MULTILINE)
    assert re.fullmatch(r'"torch>=[\d.]+"', dependencies)


def tracked() -> list[str]:
    """The files of the repository: what git tracks, or would after `git add .`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if ended.returncode != 0:
        pytest.skip("not a git checkout")
    return ended.stdout.split("\n")[:-1]


def test_the_top_level_is_short():
    allowed = {"CHANGELOG.md", "LICENSE", "README.md", "distwd", "docs", "launch", "pyproject.toml", "tests"}
    assert {name.split("/")[0] for name in tracked() if not name.startswith(".")} <= allowed


@pytest.mark.parametrize("path", FILES, ids=place_of)
def test_a_file_has_a_docstring(path):
    assert ast.get_docstring(tree_of(path)), f"{place_of(path)} needs a docstring"


@pytest.mark.parametrize("script", sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci/run"]), ids=lambda path: path.name)
def test_a_script_parses(script):
    ended = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
