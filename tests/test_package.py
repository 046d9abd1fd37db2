"""What is released: a wheel and a source archive, built without a network, and the wheel installed into an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import distwd

pytest.importorskip("hatchling", reason="wheel and sdist are built by hatchling: pip install -e '.[tests]'")
ROOT = Path(__file__).resolve().parent.parent
NAME = f"distwd-{distwd.__version__}"


def run(command: list[str], folder: Path, **environment: str) -> str:
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both archives. The wheel is built from the source archive, as pip does with one."""
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "hatchling", "build"]
    run([*build, "--target", "sdist", "--directory", str(folder)], ROOT)
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    run([*build, "--target", "wheel", "--directory", str(folder)], folder / NAME)
    return folder


def modules_in_the_tree() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "distwd").rglob("*.py")} | {"distwd/py.typed"}


def test_the_wheel_is_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
    assert {name for name in names if not name.startswith(f"{NAME}.dist-info/")} == modules_in_the_tree()
    assert f"{NAME}.dist-info/licenses/LICENSE" in names
    assert metadata["Version"] == distwd.__version__
    needed = [one for one in metadata.get_all("Requires-Dist") if "extra ==" not in one]
    assert len(needed) == 1
    assert needed[0].startswith("torch>=")
    assert "# distwd" in metadata.get_payload()  # the README, as a package index shows it


def test_the_source_archive_has_what_the_tests_need(built):
    names = {path.relative_to(built / NAME).as_posix() for path in (built / NAME).rglob("*") if path.is_file()}
    assert modules_in_the_tree() <= names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "tests/conftest.py", "launch/demo.sh"} <= names
    assert {"docs/mkdocs.yml", "docs/hooks.py", "docs/pages/index.md", "docs/pages/assets/logo.svg"} <= names
    assert not {name for name in names if name.startswith("docs/site/") or "__pycache__" in name}


def test_the_wheel_works_in_an_empty_environment(built, tmp_path):
    """An environment without pip, and without a network; torch comes from this one, distwd from the wheel alone."""
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    run([*install, str(built / f"{NAME}-py3-none-any.whl")], tmp_path)
    program = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "import torch, distwd\n"
        "w = torch.nn.Parameter(torch.tensor([1.0, -2.0])); w.grad = torch.zeros(2)\n"
        "distwd.Chain([('w', w)], distwd.WeightDecay(0.1), distwd.LR(0.5)).step()\n"
        "print(distwd.__file__, distwd.__version__, *w.tolist())\n"
    )
    printed = run([str(python), "-c", program, sysconfig.get_path("purelib")], tmp_path, PYTHONPATH="")
    file, version, first, second = printed.split()
    assert Path(file).is_relative_to(tmp_path / "empty")
    assert version == distwd.__version__
    assert (float(first), float(second)) == pytest.approx((0.95, -1.9))
