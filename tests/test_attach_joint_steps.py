"""Several optimizers of one model whose steps do not all come: a GradScaler skips one, or the training loop does."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from distwd import CautiousWeightDecay, RelativeWeightDecay, attach
from distwd.attach.zero_proxy import ZeroProxyCapture
from tests.layouts import whole_model
from tests.one_process import fp32_parameters
from tests.oracle import metric_of
from tests.runs import PARAMS_SEED, differing, grads_of
from tests.wire import Wire

COUPLINGS = ("gradient", "lr", "none")
LR, DECAY, CUT = 0.01, 0.05, 5
# Which of the two optimizers gets an infinite gradient in each step.
INFINITE = [(), (0,), (1,), (), (0, 1), (1,), ()]


def halves(params: dict, **kwargs) -> list[torch.optim.Optimizer]:
    named = list(params.items())
    return [torch.optim.SGD(part, lr=LR, momentum=0.9, **kwargs) for part in (named[:CUT], named[CUT:])]


def feed(params: dict, step: int, scale: float, infinite=()) -> None:
    for index, (name, param) in enumerate(params.items()):
        param.grad = grads_of(step)[name].to(param.dtype) * scale
        if int(index >= CUT) in infinite:
            param.grad.view(-1)[0] = torch.inf


def mad(params) -> float:
    return metric_of([param.detach() for param in params], "mad")


def by_hand(coupling: str, of: str) -> tuple[dict, list[float]]:
    """torch's SGD and a decay written around it: the number is of all, what is skipped does not move and adds nothing to an update."""
    params = {name: torch.nn.Parameter(p.detach().double()) for name, p in fp32_parameters().items()}
    optimizers, metrics = halves(params), []
    for step, infinite in enumerate(INFINITE):
        old = {name: p.detach().clone() for name, p in params.items()}
        goes = [index for index in (0, 1) if index not in infinite]
        if of == "params" and goes:
            metrics.append(mad(params.values()))
        feed(params, step, 1.0)
        for index in goes:
            for p in optimizers[index].param_groups[0]["params"]:
                if coupling == "gradient":
                    p.grad += DECAY * metrics[-1] * p.detach()
            optimizers[index].step()
        if of == "update":
            moved = [(old[n] - p.detach()) / (LR if coupling == "lr" else 1) for n, p in params.items()]
            metrics.append(mad(moved))
        for index, (name, p) in enumerate(params.items()):
            if coupling != "gradient" and int(index >= CUT) in goes:
                p.data -= DECAY * metrics[-1] * (LR if coupling == "lr" else 1) * old[name]
    return {name: p.detach() for name, p in params.items()}, metrics


# A metric of the updates works with fused optimizers only: they are stepped even where the scaler skips them.
KINDS = [(c, "params", fused) for c in COUPLINGS for fused in (False, True)]
KINDS += [(c, "update", True) for c in ("lr", "none")]


@pytest.mark.parametrize(("coupling", "of", "fused"), KINDS)
def test_an_optimizer_that_a_scaler_skips_neither_decays_nor_moves_and_the_other_does(coupling, of, fused):
    params = fp32_parameters()
    optimizers = halves(params, fused=fused)
    attachment = attach(optimizers, RelativeWeightDecay(DECAY, norm_input=of), coupling=coupling)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, backoff_factor=0.5)
    metrics = []
    for step, infinite in enumerate(INFINITE):
        feed(params, step, scaler.scale(torch.tensor(1.0)).item(), infinite)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        if of == "update" or len(infinite) < 2:
            metrics.append(attachment.stats()["RelativeWeightDecay"]["metric"].item())
    expected, numbers = by_hand(coupling, of)
    assert metrics == pytest.approx(numbers, rel=1e-4)
    for name, param in params.items():
        torch.testing.assert_close(param.detach().double(), expected[name], rtol=1e-5, atol=1e-5)


UNDEFINED = {
    "of the gradients": (RelativeWeightDecay(0.1, norm_input="grad"), "lr", True, "a metric of the gradients"),
    "of the update that is the gradient": (RelativeWeightDecay(0.1), "gradient", True, "a metric of the gradients"),
    "of an update that may not come": (RelativeWeightDecay(0.1), "lr", False, "use fused optimizers"),
    "at once": (RelativeWeightDecay(0.1, 2, "params", "mad", "params_direct"), "lr", True, "a decay at once"),
}


@pytest.mark.parametrize("case", UNDEFINED)
def test_numbers_that_a_scaler_makes_undefined_are_refused_before_anything_changes(case):
    rule, coupling, fused, message = UNDEFINED[case]
    params = fp32_parameters()
    optimizers = halves(params, fused=fused)
    attach(optimizers, rule, coupling=coupling)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    feed(params, 0, scaler.scale(torch.tensor(1.0)).item())
    with pytest.raises(ValueError, match=message) as refused:
        scaler.step(optimizers[0])
    assert "attach to each on its own" in str(refused.value)
    assert (
        differing({n: p.detach() for n, p in params.items()}, {n: p.detach() for n, p in fp32_parameters().items()})
        == []
    )
    assert not optimizers[0].state


def test_cautious_rules_are_each_optimizers_own_under_a_scaler():
    """They need no number, so nothing is shared, and nothing is refused."""
    params = fp32_parameters()
    optimizers = halves(params)
    attach(optimizers, CautiousWeightDecay(0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    feed(params, 0, scaler.scale(torch.tensor(1.0)).item(), infinite=(0,))
    for optimizer in optimizers:
        scaler.step(optimizer)
    before = fp32_parameters()
    assert [name for name in params if not torch.equal(params[name], before[name])] == list(params)[CUT:]


# --- a training loop that leaves one out ----------------------------------------------------------------------------------


def stepping(turns: list[list[int]], coupling: str, fresh: bool) -> tuple[dict, list[float]]:
    """Steps of the optimizers in turns. fresh: with a new attachment for every turn, which cannot know the last one."""
    params = fp32_parameters()
    optimizers = halves(params)
    rule = RelativeWeightDecay(DECAY, norm_input="params")
    attachment, metrics = attach(optimizers, rule, coupling=coupling), []
    for step, turn in enumerate(turns):
        if fresh:
            attachment.remove()
            attachment = attach(optimizers, rule, coupling=coupling)
        feed(params, step, 1.0)
        for index in turn:
            optimizers[index].step()
        metrics.append(attachment.stats()["RelativeWeightDecay"]["metric"].item())
        assert all(torch.equal(p.grad, grads_of(step)[name]) for name, p in params.items())
    return {name: param.detach() for name, param in params.items()}, metrics


@pytest.mark.parametrize("turns", [[[0, 1], [1], [0, 1]], [[1], [0], [0, 1]], [[1], [0, 1], [1, 0]]], ids=str)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_an_optimizer_that_is_left_out_does_not_disturb_the_next_joint_step(coupling, turns):
    values, metrics = stepping(turns, coupling, fresh=False)
    expected, numbers = stepping(turns, coupling, fresh=True)
    assert metrics == numbers
    assert len(set(metrics)) == len(turns)
    assert differing(values, expected) == []


def test_an_update_that_never_comes_is_refused():
    params = fp32_parameters()
    optimizers = halves(params)
    attach(optimizers, RelativeWeightDecay(0.1))
    feed(params, 0, 1.0)
    optimizers[0].step()
    feed(params, 1, 1.0)
    with pytest.raises(ValueError, match="before the others have stepped"):
        optimizers[0].step()


@pytest.mark.parametrize("norm_input", ["update", "grad"])
def test_gradients_may_be_cleared_before_all_have_stepped(norm_input):
    """What had a gradient, and which, is known since its optimizer stepped."""
    found = []
    for cleared in (True, False):
        params = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(2))}
        first, second = (torch.optim.SGD([param], lr=0.1) for param in params.values())
        attachment = attach([first, second], RelativeWeightDecay(0.1, norm_input=norm_input), CautiousWeightDecay(0.1))
        params["a"].grad, params["b"].grad = torch.ones(2), torch.full((2,), 3.0)
        first.step()
        if cleared:
            first.zero_grad()
        second.step()
        assert attachment.stats()["RelativeWeightDecay"]["metric"] == pytest.approx(2.0)
        found.append([param.detach() for param in params.values()])
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


def test_updates_may_be_made_from_gradients_that_come_one_after_the_other(monkeypatch):
    # The update of several optimizers is found from copies of the parameters; here that of a single one too.
    monkeypatch.setattr(ZeroProxyCapture, "works_for", lambda self, optimizer: False)
    ours, theirs = fp32_parameters(), fp32_parameters()
    optimizers = halves(ours)
    one = torch.optim.SGD(theirs.items(), lr=LR, momentum=0.9)
    attach(optimizers, RelativeWeightDecay(0.1))
    attach(one, RelativeWeightDecay(0.1))
    for step in range(3):
        for index, optimizer in enumerate(optimizers):
            feed(ours, 2 * step + index, 1.0)
            optimizer.step()
        for index, (name, param) in enumerate(theirs.items()):
            param.grad = grads_of(2 * step + int(index >= CUT))[name]
        one.step()
    assert differing({n: p.detach() for n, p in ours.items()}, {n: p.detach() for n, p in theirs.items()}) == []


def under_a_scaler() -> tuple[dict, list[int]]:
    params = fp32_parameters()
    optimizers = halves(params)
    attach(optimizers, RelativeWeightDecay(DECAY, norm_input="params"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for step, infinite in enumerate(INFINITE):
        feed(params, step, scaler.scale(torch.tensor(1.0)).item(), infinite)
        with Wire() as wire:
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        counts.append(len(wire.calls))
    return {name: param.detach() for name, param in params.items()}, counts


def test_a_joint_step_has_one_collective_and_a_skipped_one_none(worlds):
    ((alone, _),) = worlds.run(0, under_a_scaler)
    for params, counts in worlds.run(2, under_a_scaler):
        assert counts[1:] == [int(len(infinite) < 2) for infinite in INFINITE[1:]]
        assert differing(params, alone) == []


def saved_between_steps(coupling: str, norm_input: str, asked: bool) -> dict[str, torch.Tensor]:
    """Two optimizers without state: torch's checkpoint code steps each of them at lr 0 whenever it saves."""
    params = {n: torch.nn.Parameter(v) for n, v in whole_model(PARAMS_SEED).items()}
    model = torch.nn.Module()
    for name, param in params.items():
        model.register_parameter(name.replace(".", "_"), param)
    members = list(params.values())
    optimizers = [torch.optim.SGD(some, lr=0.1) for some in (members[:2], members[2:])]
    attach(optimizers, RelativeWeightDecay(0.1, norm_input=norm_input), coupling=coupling)
    for _ in range(2):
        for seed, param in enumerate(members):
            param.grad = torch.full_like(param, 0.1 * seed)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if asked:
            get_optimizer_state_dict(model, optimizers)
    return {n: p.detach() for n, p in params.items()}


@pytest.mark.parametrize("norm_input", ["params", "update"])
@pytest.mark.parametrize("coupling", ["none", "lr", "gradient"])
def test_saving_optimizers_without_state_decays_nothing_between_steps(coupling, norm_input):
    saved, untouched = (saved_between_steps(coupling, norm_input, asked) for asked in (True, False))
    assert differing(saved, untouched) == []


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_a_scheduler_may_step_before_the_other_optimizer_does(as_tensor):
    """An update is divided by the lr of its own step."""
    ends = []
    for between in (False, True):
        params = fp32_parameters()
        optimizers = halves(params)
        for optimizer in optimizers if as_tensor else ():
            optimizer.param_groups[0]["lr"] = torch.tensor(LR)
        attach(optimizers, RelativeWeightDecay(DECAY))
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1) for optimizer in optimizers]
        for step in range(3):
            feed(params, step, 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                if between:
                    scheduler.step()
            for scheduler in () if between else schedulers:
                scheduler.step()
        ends.append({name: param.detach() for name, param in params.items()})
    assert differing(*ends) == []


def test_an_update_is_captured_before_the_other_optimizers_step():
    """An average of the weights in its post hook sees it; and it stays if the round is not finished."""
    params = fp32_parameters()
    first, second = halves(params)
    attachment = attach([first, second], RelativeWeightDecay(DECAY))
    feed(params, 0, 1.0)
    before = {name: param.detach().clone() for name, param in params.items()}
    first.step()
    assert differing({name: param.detach() for name, param in params.items()}, before) == list(params)[:CUT]
    attachment.remove()
    assert differing({name: param.detach() for name, param in params.items()}, before) == list(params)[:CUT]
