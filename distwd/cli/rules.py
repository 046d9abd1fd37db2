"""The table of the rules that the commands try: one line for each thing that a user would write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import distwd

Named = list[tuple[str, nn.Parameter]]
LEARNING_RATE = 0.02


@dataclass(frozen=True, slots=True)
class RuleCase:
    """One rule with its settings.

    name: how a table calls it.
    rule: it holds settings alone, so every optimizer may have the same one.
    num_collectives: all-reduces that a step promises to make on several ranks.
    """

    name: str
    rule: distwd.Rule
    num_collectives: int

    def optimizer(
        self, way: str, named: Named
    ) -> tuple[torch.optim.Optimizer, Callable[[], dict[str, dict[str, object]]]]:
        """An optimizer with this rule, and the function that tells what was measured.

        way: "chain", or "attach": torch's own AdamW with the rule attached.
        """
        if way == "chain":
            # Not fused: those kernels round by where a tensor is cut, and bits are compared.
            chain = distwd.Chain(named, distwd.Adam(foreach=True), self.rule, distwd.LR(LEARNING_RATE))
            return chain, chain.stats
        # torch's own foreach step refuses a list of DTensors and plain tensors.
        adamw = torch.optim.AdamW(named, lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
        return adamw, distwd.attach(adamw, self.rule).stats


# A mean is right by luck where every element counts equally often too often. So there are sums (l1, l2) among these.
RULES = (
    RuleCase("WeightDecay(0.1)", distwd.WeightDecay(0.1), 0),
    RuleCase("CautiousWeightDecay(0.1)", distwd.CautiousWeightDecay(0.1), 0),
    RuleCase("DirectWeightDecay(0.01)", distwd.DirectWeightDecay(0.01), 0),
    RuleCase("WeightDecay(0.1), toward initial", distwd.WeightDecay(0.1, toward="initial"), 0),
    RuleCase("WeightDecay(0.1), ord 1, proximal", distwd.WeightDecay(0.1, ord=1, proximal=True), 0),
    RuleCase("RelativeWeightDecay: mad of update", distwd.RelativeWeightDecay(0.5), 1),
    RuleCase("RelativeWeightDecay: l1 of grad", distwd.RelativeWeightDecay(1e-4, norm_input="grad", metric="l1"), 1),
    RuleCase(
        "RelativeWeightDecay: l2 of params", distwd.RelativeWeightDecay(0.01, norm_input="params", metric="l2"), 1
    ),
    RuleCase(
        "RelativeWeightDecay: rms of update by group, cautious",
        distwd.RelativeWeightDecay(0.5, metric="rms", scope="group", cautious=True),
        1,
    ),
    RuleCase(
        "RelativeWeightDecay: linf of params by tensor",
        distwd.RelativeWeightDecay(0.5, 2, "params", "linf", scope="tensor"),
        1,
    ),
    RuleCase(
        "RelativeWeightDecay: l2 of grad per params, running mean",
        distwd.RelativeWeightDecay(0.5, norm_input="grad", metric="l2", per="params", smoothing=0.9),
        1,
    ),
    RuleCase(
        "RelativeWeightDecay: mad of second moment, power 0.5",
        distwd.RelativeWeightDecay(1.0, norm_input="second_moment", power=0.5),
        1,
    ),
    RuleCase(
        "RelativeWeightDecay: l2 of update by matrix",
        distwd.RelativeWeightDecay(0.05, metric="l2", scope="matrix"),
        1,
    ),
    RuleCase("NormControl(0.1), ratio 0.5", distwd.NormControl(0.1, 0.5), 1),
    RuleCase("Hyperball, radius initial", distwd.Hyperball(), 1),
    RuleCase("RadialBrake(0.5, 0.8)", distwd.RadialBrake(0.5, 0.8), 1),
    # The bound comes from the first step, so from the second on something is taken off.
    RuleCase(
        "ConstrainedWeightDecay: half the initial mean square",
        distwd.ConstrainedWeightDecay("initial", factor=0.5, after=1, rate=0.5),
        1,
    ),
)
WAYS = ("chain", "attach")


def rules_named(words: Sequence[str] | None) -> list[RuleCase]:
    """The rules with one of `words` in their names, in any case of letters; all for None. Raises ValueError if none has."""
    found = [rule for rule in RULES if any(word.lower() in rule.name.lower() for word in words or [""])]
    if not found:
        raise ValueError(
            f"--rules {' '.join(words or [])}: no rule has this in its name: {[rule.name for rule in RULES]}"
        )
    return found
