"""`python -m distwd bench`: what a decay costs here, in time, memory and collectives.

    python -m distwd bench
    torchrun --nproc-per-node 8 -m distwd bench --size 250M --tokens 8192

A step of an optimizer with each rule is timed in turns with torch's fused AdamW, a forward and backward pass of a small
transformer, a copy, and the all-reduce alone. All ratios are of one round of one run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import distwd

from .process import join_ranks, pick_device, say, set_threads
from .rules import WAYS, rules_named
from .timing import (
    BASELINE,
    Case,
    Here,
    Named,
    Shapes,
    Way,
    compare,
    load_averages,
    lost_in_waiting,
    machine,
    steps_table,
)

LR, DECAY = 1e-3, 0.1
NUM_LAYERS = 11
# On a card a step of a small model is as long as Python takes.
SIZES = {"cpu": (10_000_000, 512), "cuda": (250_000_000, 8192)}
EXPLAINED = (
    f"× {BASELINE}: median (quartiles) of the ratio to torch's fused AdamW with its own weight decay, in the same round. bytes/element: "
    "what a copy reads and writes for each element in the time of the step. training step: what the rule adds to a forward and backward "
    "pass and a step of AdamW."
)

# --- the model --------------------------------------------------------------------------------------------------------


def transformer(width: int, layers: int = NUM_LAYERS) -> Shapes:
    """The parameters of a decoder, 6 tensors a layer and 4 beside them: 70 tensors, 39,988,736 elements for width 512."""
    shapes: Shapes = [("embedding", (10 * width, width)), ("position", (width // 2, width))]
    for i in range(layers):
        matrices = {
            "qkv": (3 * width, width),
            "out": (width, width),
            "up": (4 * width, width),
            "down": (width, 4 * width),
        }
        shapes += [(f"{i}.{norm}", (width,)) for norm in ("norm_1", "norm_2")]
        shapes += [(f"{i}.{name}", shape) for name, shape in matrices.items()]
    return [*shapes, ("norm", (width,)), ("head", (10 * width, width))]


def transformer_of(numel: int) -> Shapes:
    """The `transformer` with about `numel` elements: as wide as with 11 layers, and as many layers as then fit best."""
    around, layer = (sum(math.prod(shape) for _, shape in transformer(32, layers)) / 32**2 for layers in (0, 1))
    layer -= around
    # Heads of 32 fill the width.
    width = 32 * max(1, round(math.sqrt(numel / (around + NUM_LAYERS * layer)) / 32))
    return transformer(width, max(1, round((numel / width**2 - around) / layer)))


class Layer(nn.Module):
    """A layer of the decoder. Its parameters are registered by name."""

    def forward(self, x: Tensor) -> Tensor:
        weight, width = dict(self.named_parameters()), x.shape[-1]
        mixed = F.linear(F.rms_norm(x, (width,), weight["norm_1"]), weight["qkv"])
        q, k, v = (part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in mixed.chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(attended.transpose(1, 2).flatten(2), weight["out"])
        hidden = F.gelu(F.linear(F.rms_norm(x, (width,), weight["norm_2"]), weight["up"]))
        return x + F.linear(hidden, weight["down"])


class Decoder(nn.Module):
    """A language model with the parameters of `transformer`.

    [batch, context + 1] numbers of tokens → the loss.
    """

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, shape in shapes:
            layer, _, own = name.rpartition(".")
            if layer and layer not in self.layers:
                self.layers[layer] = Layer()
            value = torch.empty(shape, device=device).normal_(std=0.02)
            (self.layers[layer] if layer else self).register_parameter(own, nn.Parameter(value))

    def forward(self, tokens: Tensor) -> Tensor:
        weight = dict(self.named_parameters(recurse=False))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = F.embedding(inputs, weight["embedding"]) + weight["position"][: inputs.shape[1]]
        for layer in self.layers.values():
            x = layer(x)
        logits = F.linear(F.rms_norm(x, x.shape[-1:], weight["norm"]), weight["head"])
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def forward_and_backward(here: Here, shapes: Shapes, num_tokens: int) -> tuple[Way, int]:
    """A forward and backward pass of the decoder, and how many tokens of each rank it takes: as many as fill whole rows.

    Under FSDP2 where there are several ranks; in bfloat16 by autocast on a GPU.
    """
    model = Decoder(shapes, here.device)
    if here.mesh is not None:
        for layer in model.layers.values():
            fully_shard(layer, mesh=here.mesh)
        fully_shard(model, mesh=here.mesh)
    sizes = dict(shapes)
    context = min(num_tokens, sizes["position"][0])
    batch = max(1, num_tokens // context)
    tokens = torch.randint(sizes["embedding"][0], (batch, context + 1), device=here.device)

    def work() -> None:
        with torch.autocast(here.device.type, torch.bfloat16, enabled=here.device.type == "cuda"):
            loss = model(tokens)
        loss.backward()
        # As `zero_grad` does: the next backward pass makes its gradients anew.
        for param in model.parameters():
            param.grad = None

    return work, batch * context


# --- ways to step -----------------------------------------------------------------------------------------------------


def adamw_step(named: Named, fused: bool = True) -> Way:
    """torch's AdamW with its own weight decay."""
    kind = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(named, lr=LR, weight_decay=DECAY, **kind).step  # type: ignore[arg-type]


def chain_step(named: Named, rule: distwd.Rule | None = None, compile: bool = False) -> Way:
    """A chain of fused Adam with a rule."""
    rules = [] if rule is None else [rule]
    return distwd.Chain(named, distwd.Adam(fused=True), *rules, distwd.LR(LR), compile=compile).step


def attach_step(named: Named, rule: distwd.Rule, compile: bool = False) -> Way:
    """torch's fused AdamW with a rule attached."""
    optimizer = torch.optim.AdamW(named, lr=LR, weight_decay=0, fused=True)
    distwd.attach(optimizer, rule, compile=compile)
    return optimizer.step


# --- the command ------------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """A number of things of at least 1, as 250M or 0.25B or 8192."""
    try:
        scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper(), 0)
        number = int(float(text[:-1]) * scale if scale else int(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1, such as 8192, 250M or 0.25B")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: GPUs where there are some")
    parser.add_argument("--rules", nargs="+", metavar="WORD", help="only rules with one of these in their names")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="only in a chain, or only attached (both)"
    )
    parser.add_argument("--compile", action="store_true", help="with compile=True")
    parser.add_argument(
        "--size", type=count, metavar="N", help="elements of the model, over all ranks (10M; on GPUs 250M)"
    )
    parser.add_argument("--tokens", type=count, metavar="N", help="tokens of a step, of each rank (512; on GPUs 8192)")
    parser.add_argument("--rounds", type=count, default=11, metavar="N", help="steps of every rule (11)")
    parser.add_argument("--threads", type=count, metavar="N", help="of each rank (the cores, shared by its ranks)")
    parser.add_argument("--backend", help="of the process group; left out: nccl on GPUs, gloo on CPUs")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for a rank that does not come (600)"
    )


def run(options: argparse.Namespace) -> int:
    """Time every rule; 0, or 1 if a step made other collectives than promised, or 2 where nothing can be timed."""
    begun = time.monotonic()
    try:
        rules = rules_named(options.rules)
        device = torch.device("cpu") if options.device == "cpu" else pick_device()
        if options.device == "cuda" and device.type == "cpu":
            raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
        if options.compile:
            distwd.Chain([nn.Parameter(torch.ones(1, device=device))], distwd.LR(LR), compile=True)
    except ValueError as error:
        print(f"distwd bench: error: {error}", file=sys.stderr, flush=True)  # on every rank: torchrun ends the others
        return 2
    # torchrun allows one thread, which on a CPU would time another optimizer than the user's.
    threads = set_threads(options.threads)
    cases = [Case(BASELINE, adamw_step), Case("chain, no decay", chain_step)]
    promised = dict.fromkeys((case.name for case in cases), 0)
    for rule in rules:
        for way in options.ways:

            def make(named: Named, rule: distwd.Rule = rule.rule, way: str = way) -> Way:
                return {"chain": chain_step, "attach": attach_step}[way](named, rule, options.compile)

            cases.append(Case(f"{rule.name} ({way})", make))
            promised[cases[-1].name] = rule.num_collectives
    size, num_tokens = SIZES[device.type]
    shapes = transformer_of(options.size or size)
    numel = sum(math.prod(shape) for _, shape in shapes)
    where = machine(device)
    notes = []
    if device.type == "cpu" and threads > 1 and (lost := lost_in_waiting(threads)) > 0.1:
        notes.append(
            f"other work keeps these cores busy (threads lost {lost:.0%} of the time in waiting for one another); set "
            "OMP_WAIT_POLICY=passive, or all steps take many times as long"
        )
    with join_ranks(device, options.backend, options.timeout) as ranks:
        here = Here.among(device, threads)
        say(f"distwd bench: {len(cases)} cases on {numel:,} elements, {options.rounds} rounds")
        work, num_tokens = forward_and_backward(here, shapes, options.tokens or num_tokens)
        found = compare(here, shapes, cases, options.rounds, {"forward and backward": work})
        wrong = [
            f"FAIL {row['name']}: a step made {row['collectives']} collectives; promised: {promised[row['name']]}"
            for row in found["cases"]
            if row["collectives"] != (promised[row["name"]] if ranks.size > 1 else 0)
        ]
        result: dict[str, Any] = {
            "command": "bench",
            "ok": not wrong,
            "ranks": ranks.size,
            "machines": len(ranks.hosts),
            "backend": ranks.backend,
            **where,
            "load_after": load_averages(),
            "model": f"a transformer of {numel:,} elements in {len(shapes)} parameters",
            "elements": numel,
            "tokens": num_tokens,
            "threads": threads,
            "rounds": options.rounds,
            **found,
            "faults": wrong,
            "notes": notes,
            "seconds": round(time.monotonic() - begun, 1),
            "processor_seconds": round(time.process_time(), 1),
        }
        if ranks.rank == 0:
            print(json.dumps(result, indent=1) if options.json else report(result), flush=True)
    return 1 if wrong else 0


def report(result: Mapping[str, Any]) -> str:
    """The table, what its columns mean, and what is not as promised."""
    num_ranks, num_machines = result["ranks"], result["machines"]
    where = f"{num_ranks} rank{'s' * (num_ranks > 1)} on {num_machines} machine{'s' * (num_machines > 1)}"
    versions = f"distwd {result['distwd']}, torch {result['torch']}, python {result['python']}"
    hardware = result["gpu"] or f"{result['cores']} × {result['processor']}"
    for when in ("before", "after"):
        if loads := result[f"load_{when}"]:
            hardware += f", load {loads[0]:.1f} {when}"
    lines = [f"{versions}, {where}, {result['backend']}", hardware]
    lines += [steps_table({**result, "model": f"{result['model']}, {result['tokens']} tokens a rank"})]
    lines += [textwrap.fill(text, 98) for text in (EXPLAINED, *result["notes"])]
    lines += result["faults"]
    if result["faults"]:
        lines.append("FAIL: please report this text, with the command, to the makers of distwd")
    else:
        lines.append(f"OK: {result['seconds']} s, of which the first rank computed {result['processor_seconds']} s")
    return "\n".join(lines)
