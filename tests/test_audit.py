"""`print(optimizer)` and `print(attachment)`: what is decayed, by how much and by which rule, as it is now."""

from __future__ import annotations

import pytest
import torch

import distwd
from tests import layouts, wire
from tests.layouts import LAYOUTS, NUM_ELEMENTS, SHAPES, Net, whole_model

VECTORS = sum(torch.Size(shape).numel() for shape in SHAPES.values() if len(shape) < 2)


def row(printed: str, name: str) -> str:
    (found,) = [line for line in printed.split("\n") if f" {name} " in line]
    return found


def model() -> Net:
    return Net(whole_model(7))


def test_a_chain_prints_every_rule_at_its_place():
    groups = distwd.param_groups(model(), 0.1, [("norm.*", {"weight_decay": 0.5, "lr": 0.25})])
    rules = [
        distwd.WeightDecay(1e-3, 3),
        distwd.Adam(),
        distwd.RelativeWeightDecay(0.2, cautious=True, scope="group"),
        distwd.LR(1e-3),
        distwd.CautiousWeightDecay(1e-5),
        distwd.DirectWeightDecay(2e-5),
        distwd.WeightDecay(3e-5, target="grad"),
    ]
    printed = str(distwd.Chain(groups, *rules))
    shown = row(printed, "embed.weight")
    assert "0.1; 0.2; 1e-05; 2e-05; 3e-05" in shown
    assert "11×6" in shown
    assert "lr=0.001" in shown
    for text in (
        "WeightDecay (ord 3, before Adam)",
        "RelativeWeightDecay (× mad of update by group, cautious, × lr)",
        "CautiousWeightDecay (cautious, not × lr)",
        "DirectWeightDecay (at once, not × lr)",
        "WeightDecay_1 (in the gradient)",
    ):
        assert text in shown
    assert "0.5; 0.2" in row(printed, "norm.bias")
    assert "lr=0.25" in row(printed, "norm.bias")
    assert printed.startswith("Chain(\n  WeightDecay: WeightDecay(weight_decay=0.001, ord=3)")


@pytest.mark.parametrize(
    ("coupling", "text"), [("lr", "(× lr)"), ("none", "(not × lr)"), ("gradient", "(before the optimizer)")]
)
def test_an_attachment_prints_its_coupling(coupling, text):
    groups = distwd.param_groups(model(), 0.1, attached=True)
    adamw = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0)
    attachment = distwd.attach(adamw, distwd.WeightDecay(0.7), coupling=coupling)
    printed = str(attachment)
    assert repr(attachment) == f"Attachment(AdamW, WeightDecay(weight_decay=0.7, ord=2), coupling={coupling!r})"
    assert printed.startswith(repr(attachment))
    assert f"WeightDecay {text}" in row(printed, "up.weight")
    assert f"decayed: 5 tensors, {NUM_ELEMENTS - VECTORS:,} elements; not decayed: 6 tensors, {VECTORS:,}" in printed


def test_it_prints_the_settings_of_now():
    decay = torch.tensor(0.1)
    chain = distwd.Chain(model().named_parameters(), distwd.WeightDecay(decay), distwd.LR(torch.tensor(0.5)))
    assert " 0.1 " in row(str(chain), "up.weight")
    assert "lr=0.5" in row(str(chain), "up.weight")
    decay.fill_(0.25)
    chain.param_groups[0]["lr"] = 0.125
    assert " 0.25 " in row(str(chain), "up.weight")
    assert "lr=0.125" in row(str(chain), "up.weight")
    chain.param_groups[0]["weight_decay"] = 0.0
    assert "decayed: 0 tensors" in str(chain)


def test_what_is_never_stepped_is_not_called_decayed():
    net = model()
    net.gate.weight.requires_grad_(False)
    printed = str(distwd.Chain(net.named_parameters(), distwd.WeightDecay(0.1)))
    assert "requires no gradient" in row(printed, "gate.weight")
    assert "not decayed: 1 tensors, 1 elements" in printed


def printed_on(layout: str) -> tuple[str, str, list[str]]:
    """A chain and an attachment, printed, and the collectives that printing them made."""
    held = layouts.place(layout, whole_model(7))
    chain = distwd.Chain(held.items(), distwd.Adam(), distwd.RelativeWeightDecay(0.1), distwd.LR(0.01))
    sgd = torch.optim.SGD(held.values(), lr=0.1)
    attachment = distwd.attach(sgd, distwd.RelativeWeightDecay(0.1), named_parameters=held.items())
    with wire.Wire() as seen, wire.no_host_sync():
        return str(chain), str(attachment), seen.calls


@pytest.mark.parametrize("layout", ["fsdp3", "fsdp_tp", "mixed"])
def test_every_rank_prints_whole_shapes_without_a_collective(worlds, layout):
    ranks = worlds.run(LAYOUTS[layout].ranks, printed_on, layout)
    for number, (chain, attachment, calls) in enumerate(ranks):
        assert calls == []
        for printed in (chain, attachment):
            assert f"decayed: {len(SHAPES)} tensors, {NUM_ELEMENTS:,} elements" in printed
            assert "10×6" in row(printed, "up.weight")
            assert f"rank {number} of {len(ranks)}" in printed


def piece() -> str:
    w = torch.nn.Parameter(torch.ones(2, 3))
    return str(distwd.Chain([("w", w)], distwd.WeightDecay(0.1), layout={"w": distwd.Sharded()}))


def test_a_piece_is_called_a_piece(worlds):
    for rank, printed in enumerate(worlds.run(2, piece)):
        assert f"w (piece {rank} of 2)  2×3" in printed
