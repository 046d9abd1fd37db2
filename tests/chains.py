"""Chains by name, each as parts for the oracle and as the transforms of a distwd.Chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle import AdamPart, Decay, LrPart, Part, SgdPart


@dataclass(frozen=True)
class ChainParts:
    """Parts in order, and how many collectives a step of them needs on more than one rank."""

    parts: tuple[Part, ...]
    phases: int


def chain(*parts: Part, phases: int = 0) -> ChainParts:
    return ChainParts(parts, phases)


ADAM, LR = AdamPart(), LrPart(0.01)

CHAINS: dict[str, ChainParts] = {
    "plain_adam": chain(ADAM, LR),
    "coupled": chain(Decay(0.1), ADAM, LR),
    "decoupled": chain(ADAM, Decay(0.1), LR),
    "constant": chain(ADAM, LR, Decay(0.01)),
    "ord1": chain(ADAM, Decay(0.1, ord=1), LR),
    "ord3": chain(ADAM, Decay(0.1, ord=3), LR),
    "ord_fraction": chain(ADAM, Decay(0.1, ord=1.5), LR, Decay(0.01, ord=2.5)),
    "cautious": chain(ADAM, Decay(0.1, cautious=True), LR),
    "direct": chain(ADAM, Decay(0.1), Decay(0.02, target="params_direct"), LR),
    "mad_of_update": chain(ADAM, Decay(0.1, metric="mad"), LR, phases=1),
    "l2_of_grad": chain(ADAM, Decay(0.1, metric="l2", norm_input="grad"), LR, phases=1),
    "std_of_params_coupled": chain(Decay(0.1, metric="std", norm_input="params"), ADAM, LR, phases=1),
    "rms_after_lr": chain(ADAM, LR, Decay(0.5, metric="rms"), phases=1),
    "linf_of_params": chain(ADAM, Decay(0.01, metric="linf", norm_input="params"), LR, phases=1),
    "cautious_var": chain(ADAM, Decay(0.1, metric="var", cautious=True), LR, phases=1),
    "by_tensor": chain(ADAM, Decay(0.1, metric="l1", scope="tensor"), LR, phases=1),
    "params_and_grad_share": chain(
        ADAM,
        Decay(0.01, metric="mad", norm_input="params"),
        LR,
        Decay(0.001, metric="l2", norm_input="grad", ord=1),
        phases=1,
    ),
    "update_twice": chain(ADAM, Decay(0.1, metric="mad"), LR, Decay(0.01, metric="l3", ord=1), phases=2),
    "grad_then_direct": chain(
        Decay(0.01, metric="l1", norm_input="grad", target="grad"),
        ADAM,
        Decay(0.001, metric="rms", norm_input="params", target="params_direct"),
        LR,
        phases=1,
    ),
    "folded_into_momentum": chain(ADAM, LR, Decay(0.1, metric="mad"), SgdPart(0.9), Decay(0.1), phases=1),
    "sgd_l0": chain(SgdPart(0.9), Decay(1e-4, metric="l0"), LR, phases=1),
}


def transforms_of(parts: Sequence[Part], **adam: object) -> list:
    """The same parts as distwd's transforms; `adam` goes to every Adam (foreach=, fused=, ...)."""
    import distwd

    return [_transform(part, adam, distwd) for part in parts]


def _transform(part: Part, adam: Mapping[str, object], distwd):
    if isinstance(part, LrPart):
        return distwd.LR(part.lr)
    if isinstance(part, AdamPart):
        return distwd.Adam(betas=part.betas, eps=part.eps, **adam)
    if isinstance(part, SgdPart):
        return distwd.Wrap(torch.optim.SGD, momentum=part.momentum)
    return _decay(part, distwd)


def _decay(part: Decay, distwd):
    if part.metric is not None:
        return distwd.RelativeWeightDecay(
            part.weight_decay,
            part.ord,
            part.norm_input,
            part.metric,
            part.target,
            cautious=part.cautious,
            scope=part.scope,
        )
    pulls = {key: value for key in ("toward", "cap", "proximal", "inclusive") if (value := getattr(part, key))}
    if part.target == "params_direct" and not part.cautious and not pulls:
        return distwd.DirectWeightDecay(part.weight_decay, part.ord)
    rule = distwd.CautiousWeightDecay if part.cautious else distwd.WeightDecay
    return rule(part.weight_decay, part.ord, part.target, **pulls)


def numbers_of(stats: Mapping, key: str) -> list[Tensor]:
    """The 0-d tensors called `key` ("metric" or "coefficient") in a Chain's `stats()`, in order."""
    found = []
    for value in stats.values():
        numbers = value[key]
        found += list(numbers.values()) if isinstance(numbers, Mapping) else [numbers]
    return found
