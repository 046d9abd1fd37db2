"""The documentation is complete, and its code runs."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import distwd

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
PUBLIC = [name for name in distwd.__all__ if name != "__version__"]


@dataclass(frozen=True)
class Block:
    """A fenced block of code: where it stands, its language, and its title (a file name, for what torchrun runs, or has printed)."""

    page: Path
    line: int
    language: str
    title: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2] or "", m[3]) for m in fences]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
# mkdocs puts the file there, or the part of it between two marks; tests of its own run it.
SNIPPET = re.compile(r'--8<-- "([^":]+)(?::([\w-]+))?"\n')
MARK = re.compile(r"^ *# --8<-- \[start:([\w-]+)\]$", re.MULTILINE)
TUTORIAL = ROOT / "docs/pages/start/tutorial.md"  # its blocks are run in their order, by a test of their own
PYTHON = [b for b in BLOCKS if b.language == "python" and b.page != TUTORIAL and not SNIPPET.fullmatch(b.code)]


def test_every_fence_is_read():
    """A fence in a form that the pattern misses would be code that nobody runs."""
    fences = sum(len(re.findall(r"^\s*```", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_has_at_most_76_columns(page):
    """So wide is a page of the site on a screen of 1300 pixels. What a program prints is as wide as it is, and wraps there."""
    code = [line for block in blocks_of(page) if block.language != "text" for line in block.code.split("\n")]
    assert [line for line in code if len(line) > 76] == []


def test_every_recipe_is_shown_as_it_stands():
    shown = {match[1] for block in BLOCKS if (match := SNIPPET.fullmatch(block.code)) and not match[2]}
    assert shown == {str(path.relative_to(ROOT)) for path in (ROOT / "launch" / "recipes").glob("*.py")}


def test_every_part_of_a_recipe_that_is_marked_is_shown():
    parts = {(match[1], match[2]) for block in BLOCKS if (match := SNIPPET.fullmatch(block.code)) and match[2]}
    recipes = (ROOT / "launch" / "recipes").glob("*.py")
    marks = {(str(path.relative_to(ROOT)), name) for path in recipes for name in MARK.findall(path.read_text("utf-8"))}
    assert parts == marks


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_in_the_api_reference_once(name):
    entries = re.findall(
        r"^::: distwd\.(\w+)$", (ROOT / "docs/pages/reference/api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert entries.count(name) == 1, f"docs/pages/reference/api.md needs one line '::: distwd.{name}'"


def test_the_api_reference_names_nothing_that_is_gone():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"^::: distwd\.(\w+)$", text, re.MULTILINE)) <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring_with_an_example(name):
    # Not inspect.getdoc, which would find a base class's.
    doc = getattr(distwd, name).__doc__ or ""
    assert ">>> " in doc, f"distwd.{name} needs a docstring with an example that runs"


CALLED = [getattr(distwd, name) for name in PUBLIC if name not in ("Attachment", "Plan", "PlanError")] + [
    distwd.Plan.build,
    distwd.Plan.metric,
]


@pytest.mark.parametrize("called", CALLED, ids=lambda called: called.__qualname__)
def test_every_argument_is_explained(called):
    """Each argument of what a user calls is named in its docstring, or it refers to the class whose arguments they are."""
    doc = called.__doc__ or ""
    if re.search(r"[Aa]rguments[^.]* as (`\w+`|torch\.optim)|[Aa]rguments as|errors as", doc):
        return
    names = [name for name in inspect.signature(called).parameters if name != "self"]
    assert [name for name in names if not re.search(rf"\b{name}\b", doc)] == []


class Model(torch.nn.Module):
    """What the examples call `model`: matrices and vectors, some of them normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.last = torch.nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("block", [b for b in PYTHON if not b.title], ids=str)
def test_an_example_runs(block):
    """With torch, distwd's names, a `model` and `inputs` at hand. Its optimizers then take a step that changes the model."""
    torch.manual_seed(0)
    space = {name: getattr(distwd, name) for name in PUBLIC}
    space |= {"torch": torch, "distwd": distwd, "model": Model(), "inputs": torch.randn(4, 8)}
    exec(compile(block.code, str(block), "exec"), space)
    for optimizer in [value for value in space.values() if isinstance(value, torch.optim.Optimizer)]:
        before = [p.detach().clone() for p in space["model"].parameters()]
        optimizer.zero_grad()
        space["model"](space["inputs"]).square().mean().backward()
        optimizer.step(*([space["closure"]] if "closure" in space else []))
        after = [p.detach() for p in space["model"].parameters()]
        assert all(p.isfinite().all() for p in after)
        assert any((p != was).any() for p, was in zip(after, before, strict=True))


PROGRAMS = [b for b in PYTHON if b.title]
# On these pages they run on ranks that are there already, which costs a twentieth; elsewhere as a user starts them.
ON_RANKS = [b for b in PROGRAMS if b.page.parent.name == "parallelisms" or b.page.name == "errors.md"]


# Runs a program to its end, and no further. Where a DeviceMesh keeps a gloo group's threads alive beyond destroy_process_group,
# Python's own shutdown now and then aborts on a busy machine ("terminate called without an active exception", pytorch#190489).
TO_ITS_END = """
import os, runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("block", [b for b in PROGRAMS if b not in ON_RANKS], ids=str)
def test_a_program_runs_under_torchrun(block, tmp_path):
    """As the page describes it: saved under its title, on two ranks."""
    (tmp_path / block.title).write_text(block.code, encoding="utf-8")
    (tmp_path / "to_its_end.py").write_text(TO_ITS_END, encoding="utf-8")
    # --standalone: torchrun takes a port of its own. One that was free a moment ago may be taken by now.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["to_its_end.py", block.title]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr


def edited(text: str, diff: str) -> str:
    """The file after what a reader does by hand with a block of a diff: the old lines, which stand there once, become the new."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    assert text.count(old) == 1, f"stands {text.count(old)} times in the file:\n{old}"
    return text.replace(old, "".join(line[1:] for line in lines if line[0] in " +"))


def test_the_tutorial_prints_what_it_shows(tmp_path):
    """Every block in order, as a reader goes: a file, edits of it, commands, and what they print, to three digits."""
    (tmp_path / "to_its_end.py").write_text(TO_ITS_END, encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PATH": path}
    printed: list[str] = []
    shown: list[str] = []
    for block in blocks_of(TUTORIAL):
        if block.language == "python":
            (tmp_path / block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "diff":
            file = tmp_path / block.title
            file.write_text(edited(file.read_text(encoding="utf-8"), block.code), encoding="utf-8")
        elif block.language == "bash":
            command = re.sub(r"^(torchrun .*)(?=train\.py$)", r"\1to_its_end.py ", block.code, flags=re.MULTILINE)
            ended = subprocess.run(
                ["bash", "-e", "-c", command],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert ended.returncode == 0, f"{block}: {ended.stderr}"
            printed.append(ended.stdout)
        else:
            shown.append(block.code)
    number = re.compile(r"\d+\.\d+")
    assert [number.sub("…", text) for text in printed] == [number.sub("…", text) for text in shown]
    for text, model in zip(printed, shown, strict=True):
        numbers, wanted = ([float(one) for one in number.findall(part)] for part in (text, model))
        assert numbers == pytest.approx(wanted, rel=1e-2, abs=2e-6), text
    assert printed[0] == printed[1]  # AdamW and the chain, in every digit


def printed_by(code: str) -> str:
    """What the program prints on this rank of a group that has begun before it, and goes on after it."""
    out = io.StringIO()
    begun, ended = mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group")
    with begun, ended, contextlib.redirect_stdout(out):
        exec(compile(code, "program", "exec"), {"__name__": "__main__"})
    return out.getvalue()


@pytest.mark.parametrize("block", ON_RANKS, ids=str)
def test_a_program_prints_what_its_page_shows(worlds, block):
    """On two ranks, or as many as it asks for."""
    asked = re.search(r"--nproc-per-node (\d)", block.code)
    printed = "".join(worlds.run(int(asked[1]) if asked else 2, printed_by, block.code))
    (shown,) = [b.code for b in BLOCKS if b.language == "text" and (b.page, b.title) == (block.page, block.title)]
    assert printed == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_path_in_the_text_exists(page):
    """`launch/test.sh`, `distwd/sharding/`, docs/pages/reference/laws.md: what the text points at is there."""
    paths = re.findall(r"(?<![\w/.-])((?:launch|docs|tests|distwd)/[\w./-]*\w/?)", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_architecture_page_has_a_line_for_every_module():
    tree = blocks_of(ROOT / "docs/pages/project/architecture.md")[0].code
    shown, room = set(), ""
    for indent, name, slash in re.findall(r"^( +)(\w+(?:\.py)?)(/?)", tree, re.MULTILINE):
        if slash:
            room = f"{name}/"
        elif name.endswith(".py"):
            shown.add(name if len(indent) == 2 else room + name)
    modules = {path.relative_to(ROOT / "distwd").as_posix() for path in (ROOT / "distwd").rglob("*.py")}
    assert shown == {name for name in modules if not name.endswith(("/__init__.py", "_version.py"))}


# --- every refusal has its entry ----------------------------------------------------------------------------------------

REFUSING = [*sorted((ROOT / "distwd/sharding").glob("*.py"))]
REFUSING += [
    ROOT / "distwd" / name for name in ("groups/param_groups.py", "metrics/plan.py", "metrics/replica_check.py")
]


def template_of(node: ast.expr | None) -> str:
    """The text that an expression makes, with `…` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template_of, node.values))
    if isinstance(node, ast.BinOp):
        return template_of(node.left) + template_of(node.right)
    return "…"


def messages_of(path: Path) -> set[str]:
    """What a file raises, and the problems that sharding/explain.py describes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    found = [template_of(call.args[0]) for call in raised if call.args]
    if path.name == "explain.py":
        sections = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "_section"]
        found += [template_of(call.args[2]) for call in sections]
        parts = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr | ast.Constant) and id(n) not in parts]
        found += map(template_of, texts)
        found = [
            text
            for text in found
            if re.search(r"have changed|^copies of|^the pieces|^the same name|have no names", text)
        ]
    return {text for text in map(problem_of, found) if " " in text.replace("…", "").strip()}


def problem_of(message: str) -> str:
    """Up to where the next move begins; of a message whose problem is filled in, the next move."""
    problem, _, move = message.partition("; ")
    problem = problem if re.search(r"\w", problem) else move
    return re.sub(r"(\. .*|\.|: …| \(now …\)| \(…\))+$", "", problem)


MESSAGES = sorted({(path.relative_to(ROOT).as_posix(), text) for path in REFUSING for text in messages_of(path)})


@pytest.mark.parametrize(("file", "message"), MESSAGES)
def test_a_refusal_has_its_entry_on_the_page(file, message):
    page = (ROOT / "docs/pages/reference/errors.md").read_text(encoding="utf-8")
    assert message in page, f"docs/pages/reference/errors.md says nothing of this error in {file}"


def test_the_refusals_are_found():
    texts = [text for _, text in MESSAGES]
    assert len(texts) >= 35
    for one in (
        "copies of one piece have different bits",
        "the ranks do not have the same rules",
        "… is a meta tensor",
    ):
        assert any(text.startswith(one) for text in texts), one
