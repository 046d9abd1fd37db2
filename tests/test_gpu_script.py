"""launch/gpu.sh, the minutes on a card, is tried out on the CPU: every part runs to its end and writes what it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["env", "tests", "fused", "ceilings", "numerics", "steps", "launches", "blocks"]


def run(out: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OUT": str(out), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["bash", "launch/gpu.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    done = run(out, "--dry-run")
    told = {path.name: path.read_text()[-2000:] for path in out.glob("*.txt")}
    assert done.returncode == 0, (done.stdout, told)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == PARTS
    return out


def test_every_part_leaves_its_numbers(tried):
    found = {part: json.loads((tried / f"{part}.json").read_text()) for part in PARTS[3:]}
    assert all(value > 0 for value in found["ceilings"].values())
    assert all(value >= 0 for value in found["numerics"].values())
    for row in found["steps"]["4 tensors"].values():
        assert row["card"] > 0
        assert row["ratio"] > 0
    assert {"AdamW fused", "relative update", "cautious"} <= found["steps"]["4 tensors"].keys()
    assert all(few > 0 for counts in found["launches"].values() for few in counts.values())
    assert len(found["blocks"]) == 8


def test_the_tests_for_a_card_are_read(tried):
    """All are left out here; on a card they run."""
    told = (tried / "tests.txt").read_text()
    assert "skipped" in told
    assert "error" not in told.lower()
    assert (tried / "tests.xml").exists()


def test_without_a_card_it_says_so(tmp_path):
    done = run(tmp_path, "ceilings")
    assert done.returncode == 1
    assert "failed" in done.stdout
    assert "finds no GPU" in (tmp_path / "ceilings.txt").read_text()
    assert run(tmp_path, "nothing").returncode == 2
