"""The command line of `train.py`, and the optimizer that it spells.

    --decay relative --position decoupled     ->  Chain(Adam(), RelativeWeightDecay(...), LR(...))
    --decay absolute --position coupled       ->  Chain(WeightDecay(...), Adam(), LR(...))
    --decay cautious --position constant      ->  Chain(Adam(), LR(...), CautiousWeightDecay(...))
    --norm-input second_moment --power -0.5   ->  Chain(Adam(), RelativeWeightDecay(...), LR(...)), which is SWD

Every rule of the library has its word, and every argument of a rule its flag: both are read from the library.
What is left out on the command line is left to the library's own defaults.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch.distributed import ProcessGroup

import distwd


def word_of(name: str) -> str:
    """The word for a rule: "absolute" for WeightDecay, else its name without that: "relative", "radial-brake"."""
    short = name.removesuffix("WeightDecay") or "Absolute"
    return re.sub(r"(?<!^)(?=[A-Z])", "-", short).lower()


PUBLIC = {name: getattr(distwd, name) for name in distwd.__all__ if name != "Rule"}
RULES: dict[str, type[distwd.Rule]] = {
    word_of(name): cls for name, cls in PUBLIC.items() if isinstance(cls, type) and issubclass(cls, distwd.Rule)
}
# What each rule takes; λ has a flag of its own for all of them.
KNOBS = {"none": ()} | {word: tuple(inspect.signature(rule).parameters) for word, rule in RULES.items()}
KERNELS: dict[str, dict[str, bool]] = {
    "foreach": {"foreach": True},
    "single": {"foreach": False},
    "fused": {"fused": True},
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Every rank says it in one line: torchrun ends the others as soon as one is gone,
        # so a message left to rank 0 might never be printed.
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; leaves with exit status 2 and one line of reason if it makes no sense."""
    parser = Parser(
        prog="train.py",
        description="Train a small Llama on bytes of text, sharded over any mesh, with weight decay from distwd.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for add in (add_run, add_model, add_data, add_optimizer, add_decay, add_checkpoint):
        add(parser)
    options = parser.parse_args(arguments)
    if problem := find_problem(options):
        parser.error(problem)
    return options


def add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--mesh", help="e.g. fsdp=2, dp=2,fsdp=2 or fsdp=2,tp=2; left out: fsdp over all ranks")
    group.add_argument("--steps", type=positive, default=200, help="optimizer steps of the whole run")
    group.add_argument("--stop-after", type=positive, metavar="N", help="leave after N steps of this process")
    group.add_argument("--out", default="runs/train", help="folder of log.jsonl and summary.json")
    group.add_argument("--log-every", type=positive, default=10, metavar="N")
    group.add_argument("--val-every", type=positive, default=50, metavar="N")
    group.add_argument("--seed", type=int, default=0, help="of the initial weights and of the order of the data")
    group.add_argument("--threads", type=positive, help="of one rank on a CPU; left out: cores / ranks here")
    group.add_argument("--bf16", action="store_true", help="matrix products in bfloat16 (parameters stay fp32)")
    group.add_argument("--print-plan", action="store_true", help="print who owns what, and train")
    group.add_argument(
        "--check",
        action="store_true",
        help="keep a whole-model replica in rank 0, feed it the same gradients, compare every bit at the end",
    )


def add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--layers", type=positive, default=4)
    group.add_argument("--hidden", type=positive, default=128)
    group.add_argument("--heads", type=positive, default=4)
    group.add_argument("--mlp", type=positive, default=352, help="width of the feed-forward layers")


def add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--text", nargs="+", metavar="FILE", help="left out: the documentation inside CPython")
    group.add_argument("--context", type=positive, default=128, help="bytes of one sequence")
    group.add_argument("--batch-size", type=positive, default=16, help="sequences of one step, all ranks together")
    group.add_argument("--accumulate", type=positive, default=1, help="micro-batches that a step is cut into")
    group.add_argument("--val-share", type=share, default=0.05, help="of the text, kept for validation")
    group.add_argument("--val-sequences", type=positive, default=64, help="read for one validation, at most")


def add_optimizer(parser: Parser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate")
    group.add_argument("--lr-end", type=share, default=0.1, help="the last one, as a share of --lr")
    group.add_argument("--warmup", type=positive, default=20, metavar="STEPS", help="linear; a cosine follows")
    group.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    group.add_argument("--eps", type=float, default=1e-8)
    group.add_argument("--clip", type=positive_number, metavar="NORM", help="clip the gradient of the whole model")
    # Fused kernels round differently depending on where a tensor is cut, and --check compares bits.
    group.add_argument("--kernels", choices=KERNELS, default="foreach", help="of Adam")


def add_decay(parser: Parser) -> None:
    group = parser.add_argument_group("weight decay (what is left out is as in the library)")
    group.add_argument("--decay", choices=("none", *RULES), default="relative")
    group.add_argument("--weight-decay", type=float, default=0.1)
    group.add_argument(
        "--position",
        choices=("coupled", "decoupled", "constant"),
        default="decoupled",
        help="before Adam | between Adam and the learning rate | after both",
    )
    for name, (kind, help) in FLAGS.items():
        how: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        how = {"action": "store_true"} if kind is bool else how
        if takers := [word for word, names in KNOBS.items() if name in names]:
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=f"{help} ({', '.join(takers)})", **how)


def add_checkpoint(parser: Parser) -> None:
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--checkpoint", metavar="DIR", help="where step-00000100 and so on are written")
    group.add_argument("--save-every", type=positive, metavar="N", help="beside the last step, which is always saved")
    group.add_argument("--async-save", action="store_true", help="go on training while a checkpoint is being written")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest one in --checkpoint, with its own hyperparameters and schedule",
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


def positive_number(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: 0 <= share < 1")
    return number


def word_or_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


# The arguments of rules, and what they are on a command line: a function of the text, the words to choose from, or bool for
# a flag without a value.
FLAGS: dict[str, tuple[Any, str]] = {
    "ord": (float, "2 is the usual decay"),
    "target": (("update", "grad", "params_direct"), "what it writes to"),
    "metric": (word_or_number, "mad, rms, l2, ..."),
    "norm_input": (str, "update, grad, params or second_moment"),
    "scope": (str, "all, group, tensor or matrix"),
    "cautious": (bool, "with a mask"),
    "per": (str, "what the metric is divided by: update, grad, params or second_moment"),
    "power": (float, "of the metric or the ratio"),
    "smoothing": (float, "the share of a running mean that stays"),
    "inclusive": (bool, "decay where update or parameter is 0, too"),
    "toward": (word_or_number, "a number, or initial"),
    "cap": (float, "beyond it the decay does not grow"),
    "proximal": (bool, "the implicit step"),
    "ratio": (float, "the share of the radius that is kept"),
    "radius": (word_or_number, "a number, or initial"),
    "outward": (float, "the share of a growing norm that stays"),
    "inward": (float, "the share of a shrinking norm that stays"),
    "bound": (word_or_number, "a number, initial or inflection"),
    "factor": (float, "of the initial bound"),
    "after": (int, "the steps after which it acts"),
    "rate": (float, "of the multiplier"),
    "every": (int, "steps between two decisions"),
}


def find_problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the options as a whole, or None. The same on every rank: it looks at nothing else."""
    if options.resume and not options.checkpoint:
        return "--resume needs --checkpoint DIR, to know what to go on from"
    if options.save_every and not options.checkpoint:
        return "--save-every needs --checkpoint DIR, to know where to save"
    if options.async_save and not options.checkpoint:
        return "--async-save needs --checkpoint DIR, to know where to save"
    if options.hidden % (2 * options.heads):
        return f"--hidden {options.hidden} must be an even multiple of --heads {options.heads}"
    if options.val_share > 0.5:
        return f"--val-share {options.val_share} would leave less for training than for validation; 0.5 at most"
    if not (math.isfinite(options.lr) and options.lr >= 0):
        return f"--lr {options.lr} must be a finite number of at least 0"
    return find_decay_problem(options)


def find_decay_problem(options: argparse.Namespace) -> str | None:
    """The library judges the values (metric, ord, ...); here, only whether the rule has such a knob."""
    foreign = sorted(set(given_knobs(options)) - {"weight_decay", *KNOBS[options.decay]})
    if foreign:
        flags = ", ".join("--" + name.replace("_", "-") for name in foreign)
        takers = [rule for rule, names in KNOBS.items() if set(foreign) <= set(names)]
        return f"--decay {options.decay} takes no {flags}; drop it, or use --decay {' or '.join(takers)}"
    try:
        # Of one parameter: what stands where in a chain is judged when that is made.
        make_optimizer([("example", torch.nn.Parameter(torch.ones(1, 1)))], options)
    except ValueError as error:
        return str(error)
    return None


def given_knobs(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the rule. λ is there in any case, for those that take one."""
    knobs = {name: value for name, value in vars(options).items() if name in FLAGS}
    return knobs | ({"weight_decay": options.weight_decay} if "weight_decay" in KNOBS[options.decay] else {})


def make_transforms(options: argparse.Namespace) -> list[Any]:
    """The chain that the command line spells, in order."""
    adam = distwd.Adam(betas=tuple(options.betas), eps=options.eps, **KERNELS[options.kernels])
    rate = distwd.LR(options.lr)
    if options.decay == "none":
        return [adam, rate]
    rule = RULES[options.decay](**given_knobs(options))
    return {
        "coupled": [rule, adam, rate],
        "decoupled": [adam, rule, rate],
        "constant": [adam, rate, rule],
    }[options.position]


def make_optimizer(
    named_params: Iterable[tuple[str, torch.Tensor]],
    options: argparse.Namespace,
    group: ProcessGroup | None = None,
) -> distwd.Chain:
    """group: the ranks that together hold these parameters; None means all."""
    return distwd.Chain(named_params, *make_transforms(options), group=group)
