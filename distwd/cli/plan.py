"""`python -m distwd plan`: who holds what of a model on a mesh, and what decay costs there, without running anything.

    python -m distwd plan --model config.json --mesh fsdp=8,tp=2
    python -m distwd plan --model mymodel:build --mesh dp=2,fsdp=4 --rank 5

The model is built of tensors without values, by one process that plays one rank of a process group which sends nothing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import distwd

from .._torch import fake_tensors, join_fake_group
from ..metrics.measure import OWN, Request, measure
from ..metrics.metric import Ask, StepProducts, parse_metric
from ..metrics.plan import build_plan
from ..sharding.ownership import NUM_COLUMNS
from ..sharding.params import entries_of
from ..sharding.pieces import Intervals, cuts_at
from ..sharding.tables import plan_table, text_table
from .process import is_first, parse_mesh, say
from .rules import RULES
from .wire import Wire


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="CONFIG",
        help="a config.json of transformers (or its folder), or module:function. The function returns a model; if it has a "
        "parameter `mesh` it is given the mesh and shards the model itself, else the model is cut as --mesh says",
    )
    parser.add_argument(
        "--mesh", help="e.g. fsdp=8, dp=2,fsdp=4 (HSDP) or fsdp=8,tp=2; left out: fsdp over torchrun's ranks"
    )
    parser.add_argument("--rank", type=int, default=0, help="whose table to print (0)")
    parser.add_argument(
        "--unfold", action="store_true", help="a line for each parameter, instead of one for equal layers"
    )


def run(options: argparse.Namespace) -> int:
    """Print the plan; 0, or 2 where the model cannot be built."""
    if not is_first():
        return 0  # every rank would print the same
    try:
        sizes = parse_mesh(options.mesh or f"fsdp={os.environ.get('WORLD_SIZE', 1)}")
        size = math.prod(sizes.values())
        if not 0 <= options.rank < size:
            raise ValueError(f"--rank {options.rank}: the mesh has ranks 0 to {size - 1}")
        make = find_model(options.model)
        say(f"distwd plan: {options.model} as rank {options.rank} of {size}")
        join_fake_group(options.rank, size)
        try:
            mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            model, unknown = build(make, mesh)
            # A plan refuses tensors on the meta device, which are no mistake here. These have no values either.
            with fake_tensors():
                model.to_empty(device="cpu")
            result = describe_plan(model, mesh, options.unfold)
        finally:
            dist.destroy_process_group()
    except ValueError as error:
        say(f"distwd plan: error: {error}")
        return 2
    mesh_text = ",".join(f"{axis}={number}" for axis, number in sizes.items())
    result = {"command": "plan", "model": options.model, "mesh": mesh_text, **result}
    result["unknown"] = [*unknown, *result["unknown"]]
    print(json.dumps(result, indent=1) if options.json else report(result), flush=True)
    return 0


# --- the model --------------------------------------------------------------------------------------------------------


def find_model(text: str) -> Callable[..., nn.Module]:
    """The function that builds the model which `--model` names. Raises ValueError where there is none."""
    path = Path(text)
    if path.exists():
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text())
            kind = config.pop("model_type")
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"--model {text}: {path} is no config of transformers ({error!r}); it needs a model_type"
            ) from None
        try:
            from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        except ModuleNotFoundError:
            raise ValueError(
                f"--model {text} is a config of transformers, which is not installed; install it, or name a "
                "module:function that returns the model"
            ) from None
        made = AutoConfig.for_model(kind, **config)

        def from_config() -> nn.Module:
            try:
                model = AutoModelForCausalLM.from_config(made)  # type: ignore[no-untyped-call]
            except ValueError:  # no language model
                model = AutoModel.from_config(made)  # type: ignore[no-untyped-call]
            return model  # type: ignore[no-any-return]

        return from_config
    name, _, function = text.partition(":")
    try:
        found = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--model {text}: neither a file nor a module:function that can be imported from here ({error})"
        ) from None
    if not callable(found):
        raise ValueError(
            f"--model {text}: {function} is a {type(found).__name__}, and no function that returns a model"
        )
    return found  # type: ignore[no-any-return]


def build(make: Callable[..., nn.Module], mesh: DeviceMesh) -> tuple[nn.Module, list[str]]:
    """The model on the meta device, as `mesh` cuts it, and what of it is not known."""
    takes_mesh = "mesh" in inspect.signature(make).parameters
    with torch.device("meta"):
        model = make(mesh=mesh) if takes_mesh else make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: the function returned a {type(model).__name__}, and no torch.nn.Module")
    if takes_mesh:
        return model, []
    axes, unknown = mesh.mesh_dim_names or (), []
    if "tp" in axes:
        # As transformers models say it: {"model.layers.*.mlp.up_proj": "colwise"}.
        wanted = getattr(model, "tp_plan", None)
        if not isinstance(wanted, dict) or not wanted:
            raise ValueError(
                f"--mesh with tp: {type(model).__name__} has no tp_plan that says how tensor parallelism cuts it; "
                "name a module:function with a parameter `mesh` that shards the model itself"
            )
        plan: dict[str, ParallelStyle] = {}
        for pattern, style in wanted.items():
            if "colwise" in style and "packed" not in style:
                plan[pattern] = ColwiseParallel()
            elif "rowwise" in style and "packed" not in style:
                plan[pattern] = RowwiseParallel(input_layouts=Replicate()) if "embed" in style else RowwiseParallel()
            else:
                unknown.append(f"how transformers cuts {pattern} ({style!r}): taken as whole on every tp rank")
        parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
    if "fsdp" in axes:
        # Units of layers decide what is gathered when, and not who holds what: one unit will do.
        fully_shard(model, mesh=mesh["dp", "fsdp"] if "dp" in axes else mesh["fsdp"])
    return model, unknown


# --- who holds what ---------------------------------------------------------------------------------------------------


def describe_plan(model: nn.Module, root: DeviceMesh, unfold: bool) -> dict[str, Any]:
    """The plan of this rank, what the other ranks own if they run the same program, and bytes of every exchange."""
    plan = build_plan(entries_of(distwd.param_groups(model, 0.1)), by_matrix=True)
    size = plan.world.size
    unknown = [
        "whether the other ranks run the same program: pipeline stages, and groups that are made by hand, are as rank "
        f"{plan.world.rank} has them",
        "tensors that a `layout=` would mark: without one a plain tensor is a copy on every rank",
        "whether copies have the same bits, any metric, and any time",
    ]
    owned_by_rank = [0] * size
    owners: list[int | None] = []
    num_copies: list[int] = []
    # Layers repeat, and so do their pieces.
    known: dict[Any, tuple[int | None, int, list[int]]] = {}
    for entry in plan.entries:
        tensor = entry.tensor
        key = (tensor.device_mesh, tensor.placements, tensor.shape) if isinstance(tensor, DTensor) else tensor.shape
        if key not in known:
            cuts = cuts_of_ranks(tensor, root, size)
            first: dict[Any, int] = {}
            for rank, cut in enumerate(cuts):
                if cut is not None and numel_of(cut):
                    first.setdefault(cut, rank)
            counts = [0] * size
            for cut, rank in first.items():
                counts[rank] = numel_of(cut)
            mine = cuts[plan.world.rank]
            known[key] = first.get(mine), sum(cut == mine for cut in cuts), counts
            if sum(counts) != tensor.numel():
                unknown.append(f"who holds all of {entry.name} and its like: its mesh does not have every rank")
        owner, copies, counts = known[key]
        owners.append(owner)
        num_copies.append(copies)
        for rank, count in enumerate(counts):
            owned_by_rank[rank] += count
    numel = sum(entry.tensor.numel() for entry in plan.entries)
    owned = [owner == plan.world.rank for owner in owners]
    table = plan_table(plan.world, plan.entries, plan.pieces, owned, numel, owners=owners, folds=not unfold)
    num_params = len(plan.entries)
    row_bytes = 8 * NUM_COLUMNS * (num_params + 1)
    return {
        "rank": plan.world.rank,
        "ranks": size,
        "parameters": num_params,
        "elements": numel,
        "table": table,
        "owned_by_rank": owned_by_rank,
        "exchange": {
            "all_gathers": 2 if size > 1 else 0,
            "bytes_sent": row_bytes + 8 if size > 1 else 0,
            "bytes_received": (row_bytes + 8) * size if size > 1 else 0,
            # Of the gradients of copies, once.
            "first_step_bytes": 32 * plan.num_names if size > 1 and max(num_copies, default=1) > 1 else 0,
        },
        "steps": [step_cost(plan, case.name, case.rule) for case in RULES],
        "unknown": unknown,
    }


def cuts_of_ranks(tensor: Tensor, root: DeviceMesh, size: int) -> list[tuple[Intervals, ...] | None]:
    """What each rank holds of a tensor, if all run the same program; None where that is not known.

    tensor: as this rank has it. root: the mesh of all ranks.
    """
    if not isinstance(tensor, DTensor):
        return [tuple(((0, length),) for length in tensor.shape)] * size
    mesh, names = tensor.device_mesh, root.mesh_dim_names or ()
    own = mesh.mesh_dim_names or ()
    places: dict[int, tuple[int, ...]] = {}
    if set(own) <= set(names) and own:
        # A part of the mesh of all ranks: other ranks have the part at their own place.
        for rank, place in enumerate(product(*map(range, root.shape))):
            places[rank] = tuple(place[names.index(name)] for name in own)
    else:
        places = dict(zip(mesh.mesh.flatten().tolist(), product(*map(range, mesh.shape)), strict=True))
    return [cuts_at(tensor, places[rank]) if rank in places else None for rank in range(size)]


def numel_of(cuts: Sequence[Intervals]) -> int:
    """Elements of a piece."""
    return math.prod(sum(high - low for low, high in intervals) for intervals in cuts)


def step_cost(plan: distwd.Plan, name: str, rule: distwd.Rule) -> dict[str, Any]:
    """The collectives of a step with one rule, counted: everything runs but the sending.

    first_step_bytes: of one collective more, in the first step, to see that no kept number begins as 0.
    """
    settings = rule.defaults
    asks: list[Ask] = list(dict.fromkeys(rule.measures(settings).values()))
    keeps = rule.keeps(settings)
    if rule.is_norm_rule:
        # All its norms are made of these.
        asks = [StepProducts((), settings["scope"])]
    requests = [Request(ask.parsed, [], ask.scope) for ask in asks]
    count = parse_metric("l0")
    # Whether there is a gradient anywhere, for each number that is kept.
    requests += [Request(count, [], ask.scope) for ask in asks[:1] if keeps and ask.scope in OWN]
    with Wire() as wire:
        if requests:
            measure(plan, requests)
    begins = [begin.scope for key in rule.nonzero if isinstance(begin := keeps.get(key), distwd.Measure)]
    with Wire() as first:
        if begins:
            measure(plan, [Request(count, [], scope) for scope in dict.fromkeys(begins)])
    return {
        "rule": name,
        "collectives": len(wire.calls),
        "bytes": wire.num_bytes,
        "first_step_bytes": first.num_bytes,
    }


def report(result: dict[str, Any]) -> str:
    """The plan as text."""
    exchange, owned = result["exchange"], result["owned_by_rank"]
    lines = [
        f"{result['model']}: {result['elements']:,} elements in {result['parameters']} parameters, "
        f"on {result['mesh']} ({result['ranks']} rank{'s' * (result['ranks'] > 1)})",
        "",
        result["table"],
        f"the ranks own {min(owned):,} to {max(owned):,} elements each",
        "",
    ]
    if result["ranks"] > 1:
        lines.append(
            f"once, to build the plan: {exchange['all_gathers']} all-gathers; each rank sends "
            f"{exchange['bytes_sent']:,} bytes and receives {exchange['bytes_received']:,}"
        )
    if exchange["first_step_bytes"]:
        lines.append(
            "once, in the first step, to compare the gradients of copies: 1 all-reduce of "
            f"{exchange['first_step_bytes']:,} bytes"
        )
    lines += [
        f"once, in the first step, to see that no norm is 0: 1 all-reduce of {step['first_step_bytes']:,} bytes "
        f"({step['rule']})"
        for step in result["steps"]
        if step["first_step_bytes"]
    ]
    rows = [("in each step", "collectives", "bytes per rank")]
    rows += [(step["rule"], str(step["collectives"]), f"{step['bytes']:,}") for step in result["steps"]]
    lines += ["", *text_table(rows), "", "not known without running it:"]
    return "\n".join([*lines, *(f"- {text}" for text in result["unknown"])])
