"""Laws 7 and 8: a place in the chain is a kind of decay, and the decoupled one is torch's AdamW bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests import layouts, runs
from tests.layouts import LAYOUTS, whole_model
from tests.runs import PARAMS_SEED, differing

MODES = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
VARIANTS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "both": {"amsgrad": True, "maximize": True, "betas": (0.8, 0.95), "eps": 1e-6},
}
NUM_STEPS = 5


def train(optimizer, layout: str, held: dict, schedule=None) -> dict:
    for step in range(NUM_STEPS):
        runs.feed(layout, held, step)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return layouts.view(layout, held)


def both(layout: str, dtype: torch.dtype, settings: dict, lr: object, weight_decay: object, grouped: bool, sched: bool):
    """The parameters after training with the chain and with torch's AdamW."""
    import distwd

    def groups(held: dict) -> list[dict] | list[tuple]:
        pairs = list(held.items())
        if not grouped:
            return pairs
        mine = [{"params": pairs[:4], "lr": 0.03}, {"params": pairs[4:7], "weight_decay": 0.0}, {"params": pairs[7:]}]
        return [group for group in mine if group["params"]]

    def schedule(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7) if sched else None

    held = layouts.place(layout, whole_model(PARAMS_SEED, dtype))
    decay = distwd.WeightDecay(weight_decay)
    chain = distwd.Chain(groups(held), distwd.Adam(**settings), decay, distwd.LR(lr))
    ours = train(chain, layout, held, schedule(chain))
    held = layouts.place(layout, whole_model(PARAMS_SEED, dtype))
    adamw = torch.optim.AdamW(groups(held), lr=lr, weight_decay=weight_decay, **settings)
    return ours, train(adamw, layout, held, schedule(adamw))


def assert_equal(worlds, layout, settings, *, dtype=torch.float32, lr=0.01, decay=0.1, grouped=False, sched=False):
    """On every rank; the decay is seen to be there."""
    args = (layout, dtype, settings, lr, decay, grouped, sched)
    for ours, theirs in worlds.run(LAYOUTS[layout].ranks, both, *args):
        assert differing(ours, theirs) == []
        assert differing(ours, whole_model(PARAMS_SEED, dtype)) != []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_decoupled_chain_is_adamw(worlds, mode, variant, dtype):
    assert_equal(worlds, "single", MODES[mode] | VARIANTS[variant], dtype=dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grouped", [False, True], ids=["one", "groups"])
@pytest.mark.parametrize("layout", ["single", "fsdp2", "fsdp3", "hsdp", "fsdp_tp", "mixed"])
def test_the_decoupled_chain_is_adamw_on_shards(worlds, layout, grouped, mode):
    # torch's own foreach and fused steps refuse DTensors of two meshes in one list; single-tensor is what it has.
    settings = {"foreach": False} if layout in ("fsdp_tp", "mixed") else MODES[mode]
    assert_equal(worlds, layout, settings, grouped=grouped, sched=True)


@pytest.mark.parametrize("mode", MODES)
def test_an_awkward_product_of_rate_and_decay_rounds_as_adamw_does(worlds, mode):
    for lr, decay in ((3e-4, 0.1), (1e-3 / 3, 0.07), (0.7, 1 / 3), (1e-9, 1e-2)):
        assert_equal(worlds, "single", MODES[mode], lr=lr, decay=decay)


@pytest.mark.parametrize(
    "settings", [{"foreach": False, "capturable": False}, {"fused": True}], ids=["single", "fused"]
)
def test_a_tensor_learning_rate_is_adamw_too(worlds, settings):
    assert_equal(worlds, "single", settings, lr=torch.tensor(0.01))


def ends(decays: list[tuple[str, float]]) -> dict:
    import distwd

    held = layouts.place("single", whole_model(PARAMS_SEED, torch.float64))
    makers = {"adam": lambda _: distwd.Adam(), "decay": distwd.WeightDecay, "lr": distwd.LR}
    return train(distwd.Chain(held.items(), *(makers[kind](value) for kind, value in decays)), "single", held)


def adam(weight_decay: float, decoupled: bool) -> dict:
    held = layouts.place("single", whole_model(PARAMS_SEED, torch.float64))
    optimizer = torch.optim.Adam(held.values(), 0.01, weight_decay=weight_decay, decoupled_weight_decay=decoupled)
    return train(optimizer, "single", held)


def all_close(ours: dict, theirs: dict) -> bool:
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-12, atol=1e-13) for name in ours)


def test_before_the_optimizer_is_l2_in_the_gradient():
    coupled = ends([("decay", 0.1), ("adam", 0), ("lr", 0.01)])
    assert all_close(coupled, adam(0.1, decoupled=False))
    assert not all_close(coupled, adam(0.1, decoupled=True))


def test_between_the_optimizer_and_the_rate_is_decoupled():
    decoupled = ends([("adam", 0), ("decay", 0.1), ("lr", 0.01)])
    assert all_close(decoupled, adam(0.1, decoupled=True))
    assert not all_close(decoupled, adam(0.1, decoupled=False))


def test_after_the_rate_is_not_scaled_by_it():
    constant = ends([("adam", 0), ("lr", 0.01), ("decay", 0.001)])
    assert all_close(constant, adam(0.1, decoupled=True))


def test_maximize_never_turns_decay_into_growth():
    import distwd

    for settings in MODES.values():
        param = torch.nn.Parameter(torch.full((5,), 2.0))
        param.grad = torch.zeros(5)
        chain = distwd.Chain([param], distwd.Adam(maximize=True, **settings), distwd.WeightDecay(0.1), distwd.LR(0.1))
        chain.step()
        assert (param < 2).all()
