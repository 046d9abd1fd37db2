"""Hugging Face accelerate, FSDP2 plugin: relative decay, gradient accumulation, clipping, saving and going on.

torchrun --nproc-per-node 2 launch/recipes/accelerate_fsdp2.py --out runs/accelerate
torchrun --nproc-per-node 2 launch/recipes/accelerate_fsdp2.py --out runs/accelerate --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from small import Block, ByteModel, leave, read_sequences
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from distwd import LR, Adam, Chain, RelativeWeightDecay, attach, param_groups

MICRO_BATCHES, STEPS = 2, 6


# --8<-- [start:groups]
def make_adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """As most training scripts do it: no decay for norms and biases."""
    named = list(model.named_parameters())
    is_vector = {n: "bias" in n or "norm" in n for n, _ in named}
    matrices = [(n, p) for n, p in named if not is_vector[n]]
    vectors = [(n, p) for n, p in named if is_vector[n]]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


# --8<-- [end:groups]


def main(out: Path, decay: str, resume: bool) -> None:
    if not torch.cuda.is_available():
        # accelerate shards over accelerators only. CPU ranks take the same way if they are called GPUs.
        PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[Block.__name__],
        ),
        gradient_accumulation_steps=MICRO_BATCHES,
    )
    model: torch.nn.Module = ByteModel()
    rule = RelativeWeightDecay()
    if decay == "chain":
        optimizer: torch.optim.Optimizer = Chain(param_groups(model, 0.1), Adam(), rule, LR(1e-2))
    else:
        # Names given here survive `prepare`, which puts sharded tensors into the optimizer.
        optimizer = make_adamw(model)
    if decay == "attach":
        attach(optimizer, rule, take_over=True)
    data = TensorDataset(read_sequences(2 * 4 * MICRO_BATCHES * STEPS))
    loader = DataLoader(data, batch_size=4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if decay == "attach after prepare":
        # What `prepare` returns is a wrapper without step hooks; the optimizer itself is inside.
        attach(optimizer.optimizer, rule, take_over=True)  # type: ignore[attr-defined]

    done = 0
    if resume:
        accelerator.load_state(str(out / "middle"))
        done = STEPS // 2
        loader = accelerator.skip_first_batches(loader, done * MICRO_BATCHES)
    for (text,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(text))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        done += accelerator.sync_gradients
        if accelerator.sync_gradients and done == STEPS // 2 and not resume:
            accelerator.save_state(str(out / "middle"))

    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    if accelerator.is_main_process:
        torch.save({name: p.detach().cpu() for name, p in whole.items()}, out / "model.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is saved")
    parser.add_argument("--decay", choices=["chain", "attach", "attach after prepare"], default="attach")
    parser.add_argument("--resume", action="store_true", help="go on from the state that a run before has saved")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    main(options.out, options.decay, options.resume)
    leave()
