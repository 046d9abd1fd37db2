"""launch/norm_pictures.py draws a picture for each page of a rule."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="launch/norm_pictures.py needs matplotlib: pip install -e '.[demo]'")
ROOT = Path(__file__).resolve().parent.parent
SHOWN = re.compile(r"!\[[^\]]+\]\((?:\.\./)+pictures/(norm-[\w-]+\.png)\)")


def test_the_pictures_are_those_that_the_pages_show(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "launch/norm_pictures.py", "--steps", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    drawn = {file.name for file in tmp_path.iterdir()}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())
    pages = (ROOT / "docs" / "pages" / "reference" / "rules").glob("*.md")
    assert drawn == {name for page in pages for name in SHOWN.findall(page.read_text(encoding="utf-8"))}
    kept = {file.name: file.stat().st_size for file in (ROOT / "docs" / "pages" / "pictures").glob("norm-*.png")}
    assert kept.keys() == drawn
    assert max(kept.values()) < 40_000
