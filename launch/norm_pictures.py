"""Draw what each rule does to one matrix over 200 noisy steps: the pictures of docs/pages/reference/rules.

    python launch/norm_pictures.py                                        writes docs/pages/pictures/norm-*.png
    python launch/norm_pictures.py --steps 50 --out runs/pictures         fewer steps, elsewhere

The problem is made for it: a matrix W [32, 16] behind which a normalization stands, so that its scale changes nothing that
the network computes, and targets that are mostly noise. Adam's steps then make ‖W‖ grow, and the rules say how far.
Everything is drawn from one seed: the same lines on every run of the same torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from torch import Tensor, nn

from distwd import (
    LR,
    Adam,
    CautiousWeightDecay,
    Chain,
    ConstrainedWeightDecay,
    DirectWeightDecay,
    Hyperball,
    NormControl,
    RadialBrake,
    RelativeWeightDecay,
    WeightDecay,
)

ADAM, RATE = Adam(betas=(0.9, 0.95)), LR(0.01)
ALONE: tuple[Any, ...] = (ADAM, RATE)
NORM, DISTANCE, ZEROS = "‖W‖", "‖W − W₀‖", "share of W that is exactly 0"
# Of W now and W before the first step.
MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    NORM: lambda now, start: now.norm(),
    DISTANCE: lambda now, start: (now - start).norm(),
    ZEROS: lambda now, start: (now == 0).double().mean(),
}
COLORS = ("#888888", "#0b6e99", "#c8553d")  # the first is of the run without a rule


@dataclass(frozen=True, slots=True)
class Picture:
    """One file: what is measured of W, and the chains by the names of their lines; Adam alone is added to them."""

    name: str
    chains: dict[str, tuple[Any, ...]]
    measure: str = NORM


def between(rule: Any) -> tuple[Any, ...]:
    """The chain with the rule at the place of AdamW's decay."""
    return ADAM, rule, RATE


PICTURES = (
    Picture(
        "weight-decay",
        {"WeightDecay(0.5)": between(WeightDecay(0.5)), "WeightDecay(2.0)": between(WeightDecay(2.0))},
    ),
    Picture(
        "relative-weight-decay",
        {
            "RelativeWeightDecay(1.0)": between(RelativeWeightDecay(1.0)),
            "RelativeWeightDecay(5.0)": between(RelativeWeightDecay(5.0)),
        },
    ),
    Picture(
        "cautious-weight-decay",
        {
            "CautiousWeightDecay(2.0)": between(CautiousWeightDecay(2.0)),
            "WeightDecay(2.0)": between(WeightDecay(2.0)),
        },
    ),
    Picture("direct-weight-decay", {"DirectWeightDecay(0.01)": (DirectWeightDecay(0.01), ADAM, RATE)}),
    Picture(
        "toward",
        {
            'WeightDecay(2.0, toward="initial")': between(WeightDecay(2.0, toward="initial")),
            "WeightDecay(2.0)": between(WeightDecay(2.0)),
        },
        DISTANCE,
    ),
    Picture(
        "proximal",
        {
            "WeightDecay(0.5, ord=1, proximal=True)": between(WeightDecay(0.5, ord=1, proximal=True)),
            "WeightDecay(0.5, ord=1)": between(WeightDecay(0.5, ord=1)),
        },
        ZEROS,
    ),
    Picture(
        "norm-control",
        {
            "NormControl(5.0)": between(NormControl(5.0)),
            "NormControl(5.0, ratio=1.5)": between(NormControl(5.0, ratio=1.5)),
        },
    ),
    Picture("hyperball", {"Hyperball()": between(Hyperball()), "Hyperball(radius=5.0)": between(Hyperball(5.0))}),
    Picture(
        "radial-brake",
        {"RadialBrake(0.5)": between(RadialBrake(0.5)), "RadialBrake(0, 0)": between(RadialBrake(0, 0))},
    ),
    Picture(
        "constrained-weight-decay",
        {
            'ConstrainedWeightDecay("initial", factor=1.5)': between(ConstrainedWeightDecay("initial", factor=1.5)),
            'ConstrainedWeightDecay("initial", after=100)': between(ConstrainedWeightDecay("initial", after=100)),
        },
    ),
)


def train(transforms: tuple[Any, ...], measure: str, num_steps: int) -> list[float]:
    """Train with a chain; returns what is measured of W before the first step and after each."""
    torch.manual_seed(0)
    first, last = nn.Linear(16, 32, bias=False), nn.Linear(32, 1)
    model = nn.Sequential(first, nn.LayerNorm(32, elementwise_affine=False), nn.ReLU(), last)
    # Only W is ruled: its norm is what the picture shows, and the output layer keeps what it learns.
    optimizer = Chain([("first.weight", first.weight)], *transforms)
    plain = Chain([("last.weight", last.weight), ("last.bias", last.bias)], *ALONE)
    teacher, start = torch.randn(16, 1), first.weight.detach().clone()
    values = [float(MEASURES[measure](start, start))]
    for _ in range(num_steps):
        inputs = torch.randn(32, 16)
        targets = 0.2 * inputs @ teacher + torch.randn(32, 1)
        (model(inputs) - targets).square().mean().backward()
        for one in (optimizer, plain):
            one.step()
            one.zero_grad()
        values.append(float(MEASURES[measure](first.weight.detach(), start)))
    return values


def draw(picture: Picture, num_steps: int, folder: Path) -> Path:
    """One PNG: a line for each chain, and a grey one for Adam alone."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for (label, transforms), color in zip({"without a rule": ALONE, **picture.chains}.items(), COLORS, strict=False):
        axes.plot(train(transforms, picture.measure, num_steps), color=color, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(picture.measure)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"norm-{picture.name}.png"
    # Without the version of matplotlib a file changes only with its lines.
    figure.savefig(file, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "docs/pages/pictures", help="folder of the PNGs"
    )
    options = parser.parse_args()
    matplotlib.use("Agg")  # no display is needed
    for picture in PICTURES:
        print(draw(picture, options.steps, options.out))


if __name__ == "__main__":
    main()
