"""The training program, run as its users run it: in processes of its own, for a few steps."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import distwd

for needed in ("transformers", "tqdm"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"launch/train.py needs {needed}: pip install -e '.[demo]'", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
TINY = "--layers 2 --hidden 32 --heads 2 --mlp 64 --context 32 --batch-size 4 --val-sequences 4 --steps 4 --log-every 1"


def start(
    *arguments: Any, ranks: int = 0, program: object = "launch/train.py", max_restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run train.py to its end, under torchrun with that many ranks, or as one plain process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    torchrun += ["--max-restarts", str(max_restarts)] if max_restarts else []
    command = [sys.executable, *torchrun, str(program), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if max_restarts:
        # Else ranks that start again read addresses of those that died from the store (pytorch#135712).
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def train(out: Path, *arguments: Any, **how: Any) -> str:
    done = start(*TINY.split(), "--out", out, *arguments, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def load_launch(name: str) -> ModuleType:
    """A module beside train.py, by its path: `launch` is no package, and its names are short."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_plain_process_trains_and_logs(tmp_path: Path) -> None:
    train(tmp_path, "--decay", "relative", "--norm-input", "params", "--metric", "rms", "--clip", "1", "--check")
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["val_loss"] > 0
    for line in log:
        assert line["coefficient"] == pytest.approx(0.1 * line["metric"])
        assert line["collectives"] == 0
    assert json.loads((tmp_path / "summary.json").read_text())["check"]["parameters_differ"] == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, FSDP2, relative decay, checked against one process; a checkpoint at step 2 and one at the end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, "--check", "--checkpoint", folder / "saved", "--save-every", 2, ranks=2)
    return folder


def test_two_ranks_end_with_the_bits_of_one_process(uninterrupted: Path) -> None:
    check = json.loads((uninterrupted / "summary.json").read_text())["check"]
    assert check["elements"] > 0
    assert (check["parameters_differ"], check["elements_differ"], check["largest_difference"]) == (0, 0, 0)


def test_a_relative_step_takes_one_collective(uninterrupted: Path) -> None:
    assert [line["collectives"] for line in read_log(uninterrupted)] == [1, 1, 1, 1]


def test_resume_has_the_bits_of_the_uninterrupted_run(uninterrupted: Path, tmp_path: Path) -> None:
    # What a run leaves that was killed in its third step: the checkpoint of step 2, and a log that is ahead of it.
    shutil.copytree(uninterrupted / "saved" / "step-00000002", tmp_path / "saved" / "step-00000002")
    lines = (uninterrupted / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:3]))
    output = train(tmp_path, "--checkpoint", tmp_path / "saved", "--resume", "--check", ranks=2)
    assert "resumed from" in output
    assert [without_times(line) for line in read_log(tmp_path)] == [
        without_times(line) for line in read_log(uninterrupted)
    ]
    assert_same(load_checkpoint(tmp_path / "saved", tmp_path), load_checkpoint(uninterrupted / "saved", tmp_path))


DIES_ONCE = """
import os, pathlib, signal, sys
sys.path.insert(0, "launch")
import distwd.step.coefficients, train

measure, steps = distwd.step.coefficients.measure, []

def measure_or_die(*args, **kwargs):
    # In the third step of the second rank, between its optimizer's work and the reduction; not again after the restart.
    steps.append(None)
    mark = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "died"
    if os.environ["RANK"] == "1" and len(steps) == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*args, **kwargs)

distwd.step.coefficients.measure = measure_or_die
sys.exit(train.main())
"""


@pytest.mark.parametrize("how", ["at once", "in the background"])
def test_a_job_with_a_killed_rank_restarts_and_ends_at_the_same_bits(
    uninterrupted: Path, tmp_path: Path, how: str
) -> None:
    """torchrun starts all ranks again, and they go on from the newest finished checkpoint."""
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    saving = ["--checkpoint", tmp_path / "saved", "--save-every", 1, "--resume"]
    saving += ["--async-save"] if how == "in the background" else []
    output = train(tmp_path, *saving, ranks=2, program=tmp_path / "dies_once.py", max_restarts=1)
    assert (tmp_path / "died").exists()
    # What was being written when the rank died may be lost.
    assert re.search("resumed from .*step-0000000[12]" if saving[-1] == "--async-save" else "resumed.*2", output)
    assert [without_times(line) for line in read_log(tmp_path)] == [
        without_times(line) for line in read_log(uninterrupted)
    ]
    assert_same(load_checkpoint(tmp_path / "saved", tmp_path), load_checkpoint(uninterrupted / "saved", tmp_path))


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the log without its times."""
    return {key: value for key, value in line.items() if key != "tokens_per_s"}


def load_checkpoint(folder: Path, scratch: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder / "step-00000004", scratch / "whole.pt")
    return torch.load(scratch / "whole.pt", weights_only=False)


def assert_same(mine: Any, its: Any) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == its.keys()
        for key in mine:
            assert_same(mine[key], its[key])
    elif isinstance(mine, torch.Tensor):
        assert torch.equal(mine, its)
    else:
        assert mine == its


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--decay absolute --metric rms", "--decay absolute takes no --metric; drop it, or use --decay relative"),
        ("--metric nonsense", "nonsense"),
        ("--decay relative --smoothing 1", "smoothing=1.0 must be >= 0 and < 1"),
        ("--norm-input second_moment --position coupled", "none stands before the rule"),
        ("--weight-decay -1", "weight_decay"),
        ("--resume", "--resume needs --checkpoint DIR"),
        ("--clip 0", "0 is not a positive number"),
    ],
)
def test_a_wrong_command_line_ends_with_one_clear_line(
    line: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        load_launch("options").parse_options(line.split())
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert reason in error
    assert error.count("\n") == 1


def test_every_rule_and_every_argument_of_it_has_a_word() -> None:
    options = load_launch("options")
    rules = {
        name
        for name in distwd.__all__
        if isinstance(cls := getattr(distwd, name), type) and issubclass(cls, distwd.Rule)
    }
    assert {cls.__name__ for cls in options.RULES.values()} == rules - {"Rule"}
    assert {"absolute", "relative", "cautious", "direct"} <= options.RULES.keys()
    assert {name for names in options.KNOBS.values() for name in names} <= {"weight_decay", *options.FLAGS}
    line = "--norm-input second_moment --per params --power -0.5 --smoothing 0.25 --scope tensor --cautious"
    (rule,) = [
        part for part in options.make_transforms(options.parse_options(line.split())) if isinstance(part, distwd.Rule)
    ]
    knobs = {"norm_input": "second_moment", "per": "params", "power": -0.5, "smoothing": 0.25, "scope": "tensor"}
    assert knobs.items() <= rule.defaults.items()
    assert rule.defaults["cautious"] is True


RULE_LINES = [
    "--norm-input grad --metric l2 --per params --smoothing 0.1",
    "--norm-input second_moment --power -0.5 --weight-decay 0.01",
    "--decay hyperball --lr 0.01",
]


@pytest.mark.parametrize("line", RULE_LINES)
def test_the_check_holds_for_a_rule(line: str, tmp_path: Path) -> None:
    """Two ranks end with the bits of one process, from one collective a step."""
    train(tmp_path, "--check", *line.split(), ranks=2)
    assert json.loads((tmp_path / "summary.json").read_text())["check"]["elements_differ"] == 0
    log = read_log(tmp_path)
    # The first step with radii looks whether one is 0.
    assert [each["collectives"] for each in log] == [1 + ("hyperball" in line), 1, 1, 1]
    mean = load_launch("journal").mean  # norm rules have a number for each matrix
    assert all(mean(each["coefficient"]) > 0 for each in log)


def test_a_mesh_is_read_and_held_against_the_number_of_processes() -> None:
    world = load_launch("world")
    assert world.parse_mesh(None, 3) == {"fsdp": 3}
    assert world.parse_mesh("tp=2,fsdp=2", 4) == {"fsdp": 2, "tp": 2}
    assert world.parse_mesh("dp=2", 2) == {"dp": 2, "fsdp": 1}
    for mesh, reason in (
        ("fsdp=3", "3 processes, and 2 were started"),
        ("fsdp", "cannot read 'fsdp'"),
        ("pp=2", "cannot read 'pp=2'"),
        ("fsdp=2,fsdp=1", "once at most"),
        ("fsdp=0", "cannot read 'fsdp=0'"),
    ):
        with pytest.raises(ValueError, match=reason):
            world.parse_mesh(mesh, 2)


def test_the_check_sees_a_single_wrong_bit() -> None:
    replica = load_launch("replica")
    a = torch.randn(1000)
    b = a.clone()
    assert replica.difference(a, b) == (0, 0.0)
    b[7] = torch.nextafter(b[7], torch.tensor(torch.inf))
    count, largest = replica.difference(a, b)
    assert count == 1
    assert 0 < largest < 1e-6
    assert replica.difference(torch.tensor([0.0]), torch.tensor([-0.0])) == (1, 0.0)


def test_data_resumes_where_it_stopped() -> None:
    text = load_launch("text")
    whole = text.Sequences(bytes(range(200)), context=8, seed=1)
    drawn = whole.draw(60)  # more than two epochs
    again = text.Sequences(bytes(range(200)), context=8, seed=1)
    again.position = 40
    assert torch.equal(again.draw(20), drawn[40:])
    assert sorted(drawn[:24, 0].tolist()) == list(range(0, 192, 8))


def test_the_text_is_split_without_loss() -> None:
    text = load_launch("text")
    whole = bytes(range(256)) * 1000
    train, validation = text.split_text(whole, 0.05)
    assert len(train) + len(validation) == len(whole)
    assert len(validation) == pytest.approx(0.05 * len(whole), rel=0.1)
    assert text.split_text(whole, 0) == (whole, b"")
    assert text.split_text(b"abcdefgh", 0.25) == (b"abcdgh", b"ef")
