"""torchtitan's optimizers container: several optimizers of one model, one metric, one collective.

torchrun --nproc-per-node 2 launch/recipes/torchtitan_container.py --out runs/titan
torchrun --nproc-per-node 2 launch/recipes/torchtitan_container.py --out runs/titan --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from small import ByteModel, leave, read_sequences
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from distwd import RelativeWeightDecay, attach

STEPS = 6


def main(out: Path, resume: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (ranks,))
    model = ByteModel().to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # --8<-- [start:attach]
    # The weight_decay of the configuration is λ; 0 stays 0.
    groups = [
        ParamGroupConfig(
            pattern=r"norm|bias",
            optimizer_name="Adam",
            optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.0},
        ),
        ParamGroupConfig(
            pattern=r".*",
            optimizer_name="AdamW",
            optimizer_kwargs={"lr": 1e-2, "weight_decay": 0.1},
        ),
    ]
    config = OptimizersContainer.Config(
        param_groups=groups,
        implementation="foreach",
    )
    container = OptimizersContainer(config, model_parts=[model])
    # The container only calls the others: attach to all of them together.
    optimizers = list(container.optimizers)
    attachment = attach(optimizers, RelativeWeightDecay(), take_over=True)
    # --8<-- [end:attach]

    first = 0
    if resume:
        saved = {"model": model.state_dict(), "optimizer": container.state_dict()}
        state_dict_loader.load(saved, checkpoint_id=out / "middle")
        model.load_state_dict(saved["model"])
        container.load_state_dict(saved["optimizer"])
        first = STEPS // 2
    batches = read_sequences(STEPS * ranks * 8).view(STEPS, ranks, 8, -1)[:, rank].to(device)
    for step in range(first, STEPS):
        model(batches[step]).backward()
        container.step()
        container.zero_grad()
        if step + 1 == STEPS // 2 and not resume:
            saved = {"model": model.state_dict(), "optimizer": container.state_dict()}
            state_dict_saver.save(saved, checkpoint_id=out / "middle")

    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    if rank == 0:
        print(f"{attachment.phases} collective a step for {len(container.optimizers)} optimizers")
        torch.save({name: p.detach().cpu() for name, p in whole.items()}, out / "model.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is saved")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint that a run before has saved")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    main(options.out, options.resume)
    leave()
