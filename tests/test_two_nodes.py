"""Two nodes for real: torchrun over two network namespaces, which can reach each other over one virtual cable and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_train import ROOT, TINY, assert_same, load_checkpoint, train

SCRIPT = ROOT / "tests" / "two_nodes.sh"
# With the end of unshare everything in the namespaces ends, so that a test that fails or hangs leaves nothing behind.
ALONE = ["unshare", "--net", "--mount-proc", "--pid", "--fork", "--kill-child"]
MESH = ["--mesh", "dp=2,fsdp=2"]  # a copy on each node, cut over the two ranks of a node


def namespaces() -> list[str] | str:
    """The command that makes namespaces here: as root, or as anybody where the kernel lets users have their own; or why none."""
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (iproute2 and util-linux)"
    reasons = []
    for command in (ALONE, [*ALONE, "--user", "--map-root-user"]):
        trial = "ip link add eth0 type veth peer name eth1"
        tried = subprocess.run([*command, "sh", "-c", trial], capture_output=True, text=True, timeout=60, check=False)
        if tried.returncode == 0:
            return command
        reasons.append(tried.stderr.strip())
    return f"network namespaces are not permitted here: {' / '.join(reasons)}"


FOUND = namespaces()
needs_namespaces = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))


def on_two_nodes(folder: Path, command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    arguments = [*FOUND, "bash", str(SCRIPT), str(folder), command]
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@needs_namespaces
def test_two_nodes_end_with_the_bits_of_one(tmp_path):
    """2 nodes × 2 ranks against 1 node × 4 ranks; and each against a whole-model replica in one process."""
    out = tmp_path / "two"
    torchrun = (
        f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --rdzv-id job --rdzv-backend c10d "
        # Whose turn it is to host the store is found out by host name, and here both nodes have the same one.
        "--rdzv-endpoint 10.77.0.1:29500 --rdzv-conf is_host=$((1 - NODE)) --local-addr $ADDRESS --max-restarts 0 "
    )
    training = f"launch/train.py {TINY} {' '.join(MESH)} --check --out {out} --checkpoint {out}/saved"
    done = on_two_nodes(tmp_path, torchrun + training, 300)
    logs = "".join((tmp_path / f"{node}.log").read_text() for node in (0, 1))
    assert done.returncode == 0, done.stderr + logs
    assert int(done.stdout) > 1_000_000  # it went over the cable

    train(tmp_path / "one", *MESH, "--check", "--checkpoint", tmp_path / "one/saved", ranks=4)
    for run in ("one", "two"):
        check = json.loads((tmp_path / run / "summary.json").read_text())["check"]
        assert (check["parameters_differ"], check["elements"] > 0) == (0, True)
    one, two = (load_checkpoint(tmp_path / run / "saved", tmp_path) for run in ("one", "two"))
    assert_same(one, two)


@needs_namespaces
def test_nodes_that_hang_are_gone_after_a_timeout(tmp_path):
    """And so are their namespaces, which only processes hold."""
    with pytest.raises(subprocess.TimeoutExpired):
        on_two_nodes(tmp_path, f"echo started; sleep 1000; echo {tmp_path}", 5)
    assert (tmp_path / "1.log").read_text() == "started\n"
    deadline = time.monotonic() + 60
    while left := commands_with(str(tmp_path)):
        assert time.monotonic() < deadline, left


def commands_with(text: str) -> list[str]:
    """The command lines of all processes that hold `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:  # it ended while we looked
            continue
        found += [command] if text in command else []
    return found
