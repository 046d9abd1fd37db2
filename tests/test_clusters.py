"""Files that need a cluster, as far as they can be tried without one: SLURM with fake commands, Kubernetes against published models."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import config_from_args, parse_args

from tests.test_train import ROOT, TINY, load_launch, read_log

yaml = pytest.importorskip("yaml")
train_job = pytest.importorskip("kubeflow_trainer_api.models.trainer_v1alpha1_train_job")

SCRIPTS = [".ci/run", *(str(path.relative_to(ROOT)) for path in [*ROOT.glob("launch/*.s*"), *ROOT.glob("tests/*.sh")])]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shell_script_has_no_faults_that_can_be_read_off(script):
    for command in (["bash", "-n", script], [f"{Path(sys.executable).parent}/shellcheck", "-x", script]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# --- SLURM --------------------------------------------------------------------------------------------------------------

SCONTROL = """#!/bin/sh
echo "$@" >>"$SEEN/scontrol"
echo 127.0.0.1
echo 127.0.0.2
"""
# Both nodes are this machine; a node's task knows its number, as SLURM's tasks do.
SRUN = """#!/bin/sh
for word in "$@"; do echo "$word" >>"$SEEN/srun"; done
while case $1 in -*) ;; *) false ;; esac; do shift; done
SLURM_NODEID=1 "$@" & second=$!
SLURM_NODEID=0 "$@" || exit $?
wait $second
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment as in a batch job on two nodes, with fakes of SLURM's commands that write down their arguments."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "launch").symlink_to(ROOT / "launch")
    here = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "SEEN": str(tmp_path)}
    here["PATH"] = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    here["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    slurm = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2"}
    return here | {f"SLURM_{key}": value for key, value in slurm.items()} | {"SLURM_SUBMIT_DIR": str(tmp_path / "root")}


def submit(script: Path, cluster: dict[str, str], *arguments: str) -> str:
    command = ["bash", str(script), *TINY.split(), *arguments]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_batch_job_trains_on_its_nodes_and_resumes_when_it_is_requeued(cluster, tmp_path):
    """Two torchruns of one rank each, which meet; ended after two steps; then submitted again, as SLURM does after a failure."""
    script = shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "copy")  # SLURM runs a copy from its spool
    assert "starting anew" in submit(script, cluster, "--stop-after", "2")
    out = tmp_path / "root" / "runs" / f"slurm-{cluster['SLURM_JOB_ID']}"
    assert [line["step"] for line in read_log(out)] == [1, 2]
    assert "resumed from" in submit(script, cluster | {"SLURM_RESTART_COUNT": "1"})
    assert [line["step"] for line in read_log(out)] == [1, 2, 3, 4]
    assert json.loads((out / "summary.json").read_text())["last"]["step"] == 4

    assert (tmp_path / "scontrol").read_text() == "show hostnames node[1-2]\n" * 2
    arguments = (tmp_path / "srun").read_text()
    assert arguments.startswith("--ntasks-per-node=1\n--kill-on-bad-exit=1\nbash\n-c\n")


def test_the_head_of_the_batch_script_asks_for_one_task_a_node():
    """Options that SLURM reads as comments: before the first command, each written --name or --name=value."""
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    head = lines[: next(n for n, line in enumerate(lines) if line and not line.startswith("#"))]
    options = dict((shlex.split(line)[1] + "=").split("=")[:2] for line in head if line.startswith("#SBATCH"))
    assert options["--ntasks-per-node"] == "1"
    assert options.keys() >= {"--nodes", "--requeue"}
    assert sum(line.startswith("#SBATCH") for line in lines) == len(options)


# --- Kubernetes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "kubernetes" / "trainjob.yaml").read_text())


def unknown_to_models(job: dict[str, Any]) -> bool:
    """Whether Kubeflow's published models lose something of the job; they raise on a wrong type."""
    return train_job.TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job


def test_the_kubernetes_job_is_one_by_the_published_models(job):
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert not unknown_to_models(job)


@pytest.mark.parametrize("where", ["spec.trainer.numNode", "spec.runtimePatches.0.trainingRuntimeSpec.template.specs"])
def test_a_misspelt_key_of_the_job_is_seen(job, where):
    broken = json.loads(json.dumps(job))
    *path, key = where.split(".")
    place = broken
    for step in path:
        place = place[int(step) if step.isdecimal() else step]
    place[key] = 2
    assert unknown_to_models(broken)


def test_a_wrong_type_in_the_job_is_seen(job):
    broken = json.loads(json.dumps(job))
    broken["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        unknown_to_models(broken)


def test_torchrun_and_the_program_understand_what_the_pods_run(job, monkeypatch):
    """With the variables that Kubeflow Trainer sets in each pod."""
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    given = {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": trainer["numProcPerNode"], "NODE_RANK": 1}
    for key, value in (given | {"MASTER_ADDR": "node-0-0", "MASTER_PORT": 29500}).items():
        monkeypatch.setenv(f"PET_{key}", str(value))
    config, _, rest = config_from_args(parse_args(trainer["args"]))
    assert (config.max_nodes, config.nproc_per_node, config.rdzv_endpoint) == (2, 8, "node-0-0:29500")
    options = load_launch("options").parse_options([argument for argument in rest if argument.startswith("--")])
    ranks = trainer["numNodes"] * trainer["numProcPerNode"]
    assert load_launch("world").parse_mesh(options.mesh, ranks) == {"dp": 2, "fsdp": 8}
    (patch,) = job["spec"]["runtimePatches"]
    mounts = re.findall(r"'mountPath': '([^']+)'", str(patch))
    assert [options.checkpoint.startswith(mount) for mount in mounts] == [True]
