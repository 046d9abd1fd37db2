"""Lightning Fabric over FSDP2 (`ModelParallelStrategy`): relative decay, accumulation, clipping, saving and going on.

torchrun --nproc-per-node 2 launch/recipes/lightning_fabric.py --out runs/fabric
torchrun --nproc-per-node 2 launch/recipes/lightning_fabric.py --out runs/fabric --resume
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from small import ByteModel, leave, read_sequences
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distwd import LR, Adam, Chain, RelativeWeightDecay, attach, param_groups

MICRO_BATCHES, STEPS = 2, 6


def shard(model: ByteModel, mesh: DeviceMesh) -> ByteModel:
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def main(out: Path, decay: str, resume: bool) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(shard, data_parallel_size=ranks, tensor_parallel_size=1)
    fabric = Fabric(devices=int(os.environ["LOCAL_WORLD_SIZE"]), strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(ByteModel())
    # --8<-- [start:optimizer]
    # Sharded by now. Norms and biases do not decay.
    groups = param_groups(model.module, 0.1)
    rule = RelativeWeightDecay()
    if decay == "chain":
        optimizer: Any = Chain(groups, Adam(), rule, LR(1e-2))
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        # Before `setup_optimizers`, which returns a wrapper without step
        # hooks; or afterwards to the optimizer in its `.optimizer`.
        attach(optimizer, rule)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer,
        start_factor=0.1,
        total_iters=4,
    )
    optimizer = fabric.setup_optimizers(optimizer)
    # --8<-- [end:optimizer]

    # Of a scheduler, Fabric saves with this strategy the whole object and loads nothing; its state is plain data.
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler.state_dict(), "step": 0}
    if resume:
        fabric.load(out / "middle", state)
        scheduler.load_state_dict(state["scheduler"])
    batches = read_sequences(STEPS * MICRO_BATCHES * ranks * 4).view(STEPS, MICRO_BATCHES, ranks, 4, -1)
    for step in range(state["step"], STEPS):
        for number, text in enumerate(batches[step, :, fabric.global_rank].to(fabric.device), start=1):
            with fabric.no_backward_sync(model, enabled=number < MICRO_BATCHES):
                fabric.backward(model(text) / MICRO_BATCHES)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step + 1 == STEPS // 2 and not resume:
            fabric.save(out / "middle", {**state, "scheduler": scheduler.state_dict(), "step": step + 1})

    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.module.named_parameters()}
    if fabric.is_global_zero:
        torch.save({name: p.detach().cpu() for name, p in whole.items()}, out / "model.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is saved")
    parser.add_argument("--decay", choices=["chain", "attach"], default="attach")
    parser.add_argument("--resume", action="store_true", help="go on from the state that a run before has saved")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    main(options.out, options.decay, options.resume)
    leave()
