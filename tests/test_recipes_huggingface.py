"""launch/recipes/huggingface_trainer.py: what the Trainer trains is what the same loop trains without it, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distwd import LR, Adam, Chain, RelativeWeightDecay
from tests import recipes
from tests.layouts import mesh_of
from tests.runs import differing

STEPS, TOKENS = 6, 8 * 2 * 24
RANKS = {"alone": 0, "ddp": 2, "fsdp": 2}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes))


def wrapped(model, kind: str):
    if kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh_of(2, names=("dp",)))
        fully_shard(model, mesh=mesh_of(2, names=("dp",)))
    return DistributedDataParallel(model) if kind == "ddp" else model


def by_hand(kind: str, decay: str) -> dict[str, torch.Tensor]:
    """Two micro-batches of eight sequences a step, over one process or two; clipped, lr up for two steps and down to 0."""
    model = llama()
    forward = wrapped(model, kind)
    if decay == "chain":
        optimizer = Chain(recipes.grouped(model, "weight_decay"), Adam(), RelativeWeightDecay(), LR(1e-2))
    else:
        optimizer = recipes.adamw(model, RelativeWeightDecay() if decay == "attach" else None)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2 if step < 2 else (6 - step) / 4)
    rank, ranks = (dist.get_rank(), 2) if RANKS[kind] else (0, 1)
    batches = recipes.small().read_sequences(96).view(STEPS, 2, ranks, 8 // ranks, -1)[:, :, rank]
    for step in batches:
        for number, text in enumerate(step):
            if kind == "fsdp":
                model.set_requires_gradient_sync(number == 1)
            elif kind == "ddp":
                forward.require_backward_grad_sync = number == 1
            loss = forward(input_ids=text, labels=text, num_items_in_batch=torch.tensor(TOKENS)).loss
            (loss * ranks).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return recipes.whole(model)


@pytest.mark.parametrize(
    ("kind", "decay"), [("alone", "attach"), ("ddp", "attach"), ("fsdp", "attach"), ("fsdp", "chain")]
)
def test_the_trainer_trains_as_the_loop_without_it_and_resumes_where_it_stopped(worlds, tmp_path, kind, decay):
    ranks = RANKS[kind]
    expected, bare = (worlds.run(ranks, by_hand, kind, each)[0] for each in (decay, "none"))
    arguments = ["--decay", decay, *(["--fsdp"] if kind == "fsdp" else [])]
    recipes.run("huggingface_trainer.py", tmp_path, *arguments, ranks=ranks)
    assert differing(recipes.trained(tmp_path), expected) == []
    assert recipes.apart(expected, bare) > 1e-4
    if kind != "ddp":
        (tmp_path / "model.pt").unlink()
        recipes.run("huggingface_trainer.py", tmp_path, *arguments, "--resume", ranks=ranks)
        assert differing(recipes.trained(tmp_path), expected) == []
