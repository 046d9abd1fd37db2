"""`python -m distwd`: run as its users run it; what it says is what real ranks find, and a broken distwd fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distwd import Plan, param_groups
from distwd.__main__ import main
from distwd.cli import bench, layouts, plan
from distwd.cli.rules import RULES
from distwd.cli.wire import Wire

ROOT = Path(__file__).parent.parent
HERE = "tests.test_command_line"


def start(*arguments: str, ranks: int = 0, program: tuple[str, ...] = ("-m", "distwd"), folder: Path = ROOT) -> Any:
    """Run the command line under torchrun with that many ranks, or as one plain process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return subprocess.run(
        [sys.executable, *torchrun, *program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- plan -------------------------------------------------------------------------------------------------------------


def build(mesh: DeviceMesh) -> nn.Module:
    """A model that shards itself: tensor parallel, then FSDP2. Its norms and experts show nothing of `tp`."""
    net = layouts.Transformer()
    if "tp" in (mesh.mesh_dim_names or ()):
        layouts.tensor_parallel_(net, mesh["tp"])
    layouts.shard_(net, mesh["dp", "fsdp"] if "dp" in (mesh.mesh_dim_names or ()) else mesh["fsdp"])
    return net


def build_whole() -> nn.Module:
    return layouts.Transformer()


def planned_on_ranks(sizes: dict[str, int], shards_itself: bool) -> tuple[str, int, int]:
    """On real ranks: the table, and how many elements this rank and the model have."""
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    model = build(mesh) if shards_itself else plan.build(build_whole, mesh)[0].to_empty(device="cpu")
    for param in model.parameters():
        nn.init.ones_(param)  # of zeros no norm is kept
    found = Plan.build(param_groups(model, 0.1))
    owned = sum(piece.numel for piece, own in zip(found.pieces, found.owned, strict=True) if own)
    return str(found), owned, found.numel


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table without its head and its last line, but for who owns a piece that is not this rank's."""
    rows = [line.split("  ") for line in table.splitlines()[1:-1]]
    return [[cell.strip() for cell in row if cell.strip()] for row in rows]


@pytest.mark.parametrize(
    ("mesh", "shards_itself", "rank"),
    [
        ("fsdp=4", False, 3),
        ("dp=2,fsdp=2", False, 3),
        ("dp=2,fsdp=2", True, 3),
        ("fsdp=2,tp=2", True, 1),
        ("fsdp=3", True, 2),
    ],
)
def test_a_plan_says_what_real_ranks_find(worlds, capsys, mesh, shards_itself, rank):
    """One rank for each mesh: torch keeps what DTensor operations give by mesh, of which two are equal whoever asks."""
    sizes = {axis: int(number) for axis, number in (part.split("=") for part in mesh.split(","))}
    ranks = worlds.run(torch.Size(sizes.values()).numel(), planned_on_ranks, sizes, shards_itself)
    function = "build" if shards_itself else "build_whole"
    arguments = ["--model", f"{HERE}:{function}", "--mesh", mesh, "--rank", str(rank), "--unfold", "--json"]
    assert main(["plan", *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["owned_by_rank"] == [owned for _, owned, _ in ranks]
    assert said["elements"] == ranks[0][2] == sum(said["owned_by_rank"])
    for ours, theirs in zip(rows_of(said["table"]), rows_of(ranks[rank][0]), strict=True):
        assert ours[:4] + ours[5:] == theirs[:4] + theirs[5:]
        assert (ours[4] == "yes") == (theirs[4] == "yes")


def test_equal_layers_share_a_line_and_a_copy_says_who_owns_it(capsys):
    assert main(["plan", "--model", f"{HERE}:build", "--mesh", "fsdp=2,tp=2", "--rank", "1"]) == 0
    out = capsys.readouterr().out
    (norm,) = [line.split() for line in out.splitlines() if line.startswith("blocks.0–1.norm.weight")]
    assert norm == ["blocks.0–1.norm.weight", "46", "23", "S(0)", "rank", "0", "1", "0"]
    assert "blocks.0–1.q.weight" in out
    assert "not known without running it:" in out


def payload(name: str, sizes: dict[str, int]) -> tuple[int, int, int]:
    """Bytes of the collectives of two real steps with a rule, and how many collectives the second made."""
    net = build(init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)))
    for param in net.parameters():
        nn.init.ones_(param)  # of zeros no norm is kept
    case = next(case for case in RULES if case.name == name)
    optimizer, _ = case.optimizer("chain", list(net.named_parameters()))
    wires = []
    for _ in range(2):
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        with Wire() as wire:
            optimizer.step()
        wires.append(wire)
    return wires[0].num_bytes, wires[1].num_bytes, len(wires[1].calls)


@pytest.mark.parametrize("mesh", ["fsdp=2", "dp=2,fsdp=1"])
def test_bytes_are_those_of_real_steps(worlds, capsys, mesh):
    """Of the first step, which builds the plan and compares the gradients of copies, and of a later one."""
    assert main(["plan", "--model", f"{HERE}:build", "--mesh", mesh, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    sizes = {axis: int(number) for axis, number in (part.split("=") for part in mesh.split(","))}
    once = said["exchange"]["bytes_sent"] + said["exchange"]["bytes_received"] + said["exchange"]["first_step_bytes"]
    assert [step["rule"] for step in said["steps"]] == [case.name for case in RULES]
    for case, step in zip(RULES, said["steps"], strict=True):
        # The plan's groups are those of param_groups; here all is one group, which only numbers by group can tell.
        if "by group" in case.name:
            continue
        first = once * bool(step["bytes"]) + step["bytes"] + step["first_step_bytes"]
        expected = first, step["bytes"], case.num_collectives
        assert worlds.run(2, payload, case.name, sizes) == [expected] * 2, case.name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere:build"], "neither a file nor a module:function"),
        (["--model", f"{HERE}:ROOT"], "no function that returns a model"),
        (["--model", "pyproject.toml"], "no config of transformers"),
        (["--model", f"{HERE}:build", "--mesh", "rows=2"], "cannot read 'rows=2'"),
        (["--model", f"{HERE}:build", "--mesh", "fsdp=2", "--rank", "2"], "the mesh has ranks 0 to 1"),
        (["--model", f"{HERE}:build_whole", "--mesh", "fsdp=1,tp=2"], "has no tp_plan"),
        (["--model", f"{HERE}:start", "--mesh", "fsdp=2"], "no torch.nn.Module"),
    ],
)
def test_a_model_or_mesh_that_cannot_be_planned_is_said(capsys, arguments, words):
    assert main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not dist.is_initialized()


def test_a_config_of_transformers_is_planned_as_the_page_shows(tmp_path):
    pytest.importorskip("transformers")
    page = (ROOT / "docs/pages/reference/command-line.md").read_text(encoding="utf-8")
    (config,) = re.findall(r'^```json title="config.json"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r'^```text title="plan"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL)
    (arguments,) = re.findall(r"^python -m distwd (plan --model config.json.*)$", page, re.MULTILINE)
    (tmp_path / "config.json").write_text(config)
    done = start(*arguments.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    # What follows is a line for each rule, and there will be more.
    assert done.stdout.split("in each step")[0] == shown.split("in each step")[0]


def test_plan_under_torchrun_is_printed_once():
    done = start("plan", "--model", f"{HERE}:build", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 0 of 2 owns") == 1


# --- verify -----------------------------------------------------------------------------------------------------------

NAMES = ("DDP", "FSDP2", "HSDP", "TP", "FSDP2 x TP", "experts", "2 stages")

BROKEN = """
import sys
import distwd.metrics.measure
from distwd.__main__ import main
from distwd.cli.process import end_process
distwd.metrics.measure.sum_over_ranks = lambda values, world: values
end_process(main(sys.argv[1:]))
"""


def test_a_local_metric_fails_under_torchrun(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    program = (str(tmp_path / "broken.py"),)
    done = start("verify", "--layouts", "FSDP2", "--rules", "l2 of params", ranks=2, program=program)
    assert done.returncode == 1, done.stdout + done.stderr
    (line, other) = [line for line in done.stdout.splitlines() if line.startswith("FAIL FSDP2, bits")]
    assert line.startswith(
        "FAIL FSDP2, bits, RelativeWeightDecay: l2 of params (chain), rank 0 and 1 more: step 1 of 5: "
    )
    assert "metric is" in line
    assert "(attach)" in other
    assert "Please report" in done.stdout


def test_verify_runs_as_one_process():
    done = start("verify", "--rules", "l2 of params", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"]
    assert [one["layout"] for one in said["layouts"]] == ["one process", "DDP", "FSDP2"]
    assert all(one["equal"] == one["cases"] == 2 for one in said["layouts"])
    assert set(said["left_out"]) == set(NAMES) - {"DDP", "FSDP2"}


def test_verify_runs_under_torchrun():
    done = start("verify", "--rules", "DirectWeightDecay", "--layouts", "HSDP", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [line.split("  ") for line in done.stdout.splitlines() if line.startswith("HSDP")]
    assert [cell.strip() for cell in row if cell][:5] == ["HSDP", "dp=2,fsdp=1", "2 of 2", "0", "2 of 2"]
    assert "OK: " in done.stdout
    assert "HSDP (dp=2,fsdp=1): " in done.stderr  # progress


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--rules", "nothing"], "no rule has this"), (["--layouts", "SDP"], "on 1 ranks there are")],
)
def test_wrong_words_are_said(capsys, arguments, words):
    assert main(["verify", "--rules", "l2 of params", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not dist.is_initialized()


ALONE = """
import os, sys
import distwd.metrics.measure
from distwd.__main__ import main
from distwd.cli.process import end_process

def fail(values, world):
    raise RuntimeError("out of memory")

if os.environ["RANK"] == "1":
    distwd.metrics.measure.sum_over_ranks = fail
end_process(main(sys.argv[1:]))
"""


def test_a_rank_that_fails_alone_says_so_and_ends_all(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    arguments = ("verify", "--layouts", "FSDP2", "--rules", "l2 of params", "--timeout", "20")
    done = start(*arguments, ranks=2, program=(str(tmp_path / "alone.py"),))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL FSDP2, error, rank 1 alone: RuntimeError: out of memory" in done.stderr
    assert "OK" not in done.stdout


# --- bench ------------------------------------------------------------------------------------------------------------

WRONG_PROMISE = """
import sys
from dataclasses import replace
import distwd.cli.rules
from distwd.__main__ import main
from distwd.cli.process import end_process
distwd.cli.rules.RULES = tuple(
    replace(rule, num_collectives=2) if rule.name.startswith("NormControl") else rule for rule in distwd.cli.rules.RULES
)
end_process(main(sys.argv[1:]))
"""
SMALL = ("--size", "100K", "--tokens", "20", "--rounds", "2", "--threads", "1")


def test_bench_times_rules_on_ranks_and_counts_what_they_promise(tmp_path):
    """With one rule that promises what it does not keep: that row alone fails."""
    (tmp_path / "wrong.py").write_text(WRONG_PROMISE)
    arguments = ("bench", *SMALL, "--rules", "mad of update", "NormControl", "Cautious", "--json")
    done = start(*arguments, ranks=2, program=(str(tmp_path / "wrong.py"),))
    assert done.returncode == 1, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert not said["ok"]
    assert [text.split(":")[0] for text in said["faults"]] == [
        f"FAIL NormControl(0.1), ratio 0.5 ({way})" for way in ("chain", "attach")
    ]
    counted = {row["name"]: row["collectives"] for row in said["cases"]}
    assert counted.pop("AdamW fused") == counted.pop("chain, no decay") == 0
    for name, number in counted.items():
        assert number == (0 if name.startswith("CautiousWeightDecay(0.1)") else 1), name
    assert len(counted) == 8  # RelativeWeightDecay by group is cautious, too
    for row in said["cases"]:
        assert 0 < row["seconds"]["best"] <= row["seconds"]["median"]
        assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
    assert set(said["beside"]) == {"copy", "forward and backward", "all-reduce"}
    assert all(seconds["best"] > 0 for seconds in said["beside"].values())
    assert (said["ranks"], said["tokens"], said["rounds"]) == (2, 16, 2)  # rows of 16 tokens
    assert "10 cases on 95,136 elements" in done.stderr  # progress


def test_bench_runs_as_one_process_and_prints_a_table(capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["bench", *SMALL, "--rules", "l2 of params", "--ways", "attach"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines() if line.startswith("  ")]
    assert rows[0] == [
        "step",
        "best ms",
        "median ms",
        "× AdamW fused",
        "of best",
        "bytes/element",
        "training step",
        "collectives",
        "extra MiB",
    ]
    assert [row[0] for row in rows[1:4]] == [
        "AdamW fused",
        "chain, no decay",
        "RelativeWeightDecay: l2 of params (attach)",
    ]
    assert rows[3][-2] == "0"  # one rank
    assert "forward and backward: " in out
    assert "all-reduce: " not in out
    assert "OK: " in out
    assert not dist.is_initialized()


def test_the_model_of_a_bench_has_the_size_that_is_asked_for():
    for numel in (100_000, 1_000_000, 10_000_000, 250_000_000):
        shapes = bench.transformer_of(numel)
        assert sum(torch.Size(shape).numel() for _, shape in shapes) == pytest.approx(numel, rel=0.1)
    shapes = bench.transformer(32, layers=2)
    model = bench.Decoder(shapes, torch.device("cpu"))
    found = [(name.removeprefix("layers."), tuple(param.shape)) for name, param in model.named_parameters()]
    assert sorted(found) == sorted(shapes)
    model(torch.zeros(2, 9, dtype=torch.long)).backward()
    assert all(param.grad is not None and param.grad.norm() > 0 for param in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rules", "nothing"], "no rule has this"),
        (["--device", "cuda"], "finds no GPU here"),
        (["--compile"], "torch.compile does not work here"),
    ],
)
def test_what_cannot_be_timed_is_said(capsys, monkeypatch, arguments, words):
    def no_compiler(*args: Any) -> None:
        raise ValueError("compile=True: torch.compile does not work here")

    monkeypatch.setattr("distwd.step.runner.check_compiler", no_compiler)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *SMALL, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not dist.is_initialized()


@pytest.mark.parametrize("text", ["0", "-5", "1e3", "10Q", "M", "nanM", "infB"])
def test_a_number_that_is_none_is_said(capsys, text):
    with pytest.raises(SystemExit):
        main(["bench", "--size", text])
    assert "is no number of at least 1" in capsys.readouterr().err
