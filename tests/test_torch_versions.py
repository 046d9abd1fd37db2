"""launch/torch_versions.sh: one row for each release, also behind one that failed; the exit status tells of a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOME_TESTS = """
import pytest

def test_passes(): pass
def test_passes_too(): pass
def test_is_skipped(): pytest.skip("an old release")
"""


def run(folder: Path, tests: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/torch_versions.sh", "--folder", str(folder), *arguments]
    pytest_arguments = ["--", "-n", "0", "-p", "no:cacheprovider", str(tests)]
    return subprocess.run(
        [*command, *pytest_arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def environment(folder: Path, name: str, command: str) -> Path:
    """An environment whose python is a shell command."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{command}\n")
    python.chmod(0o755)
    return folder / name


def cells(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]


def test_each_release_has_its_row_and_its_own_environment(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(SOME_TESTS)
    this = f'exec "{sys.executable}" "$@"'
    environment(tmp_path, "torch-1.0", "echo this one is broken; exit 3")
    kept = environment(tmp_path, "torch-2.0-python3.1", this)

    done = run(tmp_path, tests, "--offline", "2.0@python3.1")
    assert done.returncode == 0, done.stdout + done.stderr
    heads, _, row = cells(done.stdout)
    assert heads == ["torch", "Python", "date", "passed", "skipped", "failed", "minutes"]
    assert row[:2] == [torch.__version__, ".".join(map(str, sys.version_info[:3]))]
    assert row[3:6] == ["2", "1", "0"]

    # One that does not run stops no other, and is not forgotten in the end.
    tests.write_text(SOME_TESTS + "def test_fails(): assert 0\n")
    done = run(tmp_path, tests, "--offline", "--delete", "1.0", "2.0@python3.1")
    assert done.returncode == 1
    *_, broken, row = cells(done.stdout)
    assert (broken[0], row[3:6]) == ("1.0", ["2", "1", "1"])
    assert "did not run" in broken[1]
    assert "this one is broken" in (tmp_path / "torch-1.0.log").read_text()
    assert not kept.exists()


def test_no_tests_are_no_success(tmp_path):
    tests = tmp_path / "test_none.py"
    tests.write_text("")
    environment(tmp_path, "torch-2.0", f'exec "{sys.executable}" "$@"')
    done = run(tmp_path, tests, "--offline", "2.0")
    assert done.returncode == 1
    assert cells(done.stdout)[-1][3:6] == ["0", "0", "0"]


def test_a_release_that_cannot_be_installed_is_a_failure(tmp_path):
    """Of a Python that is none no environment can be made: nothing is asked of the network."""
    done = run(tmp_path, tmp_path, "2.0@no-such-python")
    assert done.returncode == 1
    assert "could not be installed" in cells(done.stdout)[-1][1]
    assert "no-such-python" in (tmp_path / "torch-2.0-no-such-python.log").read_text()


def test_wrong_options_are_told(tmp_path):
    done = run(tmp_path, tmp_path, "--nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--nonsense" in done.stderr
