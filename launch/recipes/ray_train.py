"""Ray Train: workers that Ray starts, a model cut over them by FSDP2, relative decay by distwd.

    python launch/recipes/ray_train.py                     2 workers on CPUs, on a Ray of its own
    python launch/recipes/ray_train.py --gpus --workers 8  a worker for each GPU, on the cluster that RAY_ADDRESS names

Ray's TorchTrainer makes the process group, as torchrun would; from there on nothing is different. A checkpoint holds what
DCP's get_state_dict gives, whole, so that a run that is started again, by Ray or by hand, goes on with the same bits.
Needs: pip install 'distwd[recipes]'
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distwd

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def train(config: dict[str, Any]) -> None:
    """What each worker runs: a small model learns a fixed function of random inputs."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    model = make_model().to(device)
    fully_shard(model, mesh=init_device_mesh(device.type, (size,)))
    optimizer = make_optimizer(model, config["weight_decay"])
    first = restore(model, optimizer) + 1
    x, y = (part.chunk(size)[rank].to(device) for part in make_data())
    for step in range(first, config["steps"] + 1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if step % config["every"] == 0 or step == config["steps"]:
            report(step, loss, model, optimizer)


def make_model() -> nn.Module:
    torch.manual_seed(0)  # the same weights on every worker, before they are cut
    return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 1))


# --8<-- [start:optimizer]
def make_optimizer(model: nn.Module, weight_decay: float) -> distwd.Chain:
    """Called in the worker, after `fully_shard`: the group exists there."""
    return distwd.Chain(
        model.named_parameters(),
        distwd.Adam(foreach=True),
        distwd.RelativeWeightDecay(weight_decay),
        distwd.LR(0.01),
    )


# --8<-- [end:optimizer]


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    return x, x.sin().sum(1, keepdim=True)


def report(step: int, loss: torch.Tensor, model: nn.Module, optimizer: distwd.Chain) -> None:
    """Numbers, and a checkpoint of rank 0's; getting the whole state is a collective, so every worker asks."""
    (told,) = optimizer.stats().values()
    numbers = {"step": step, "loss": loss.item(), "coefficient": told["coefficient"].item()}
    model_state, optimizer_state = get_state_dict(model, optimizer, options=WHOLE)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            torch.save(
                {"step": step, "model": model_state, "optimizer": optimizer_state}, os.path.join(folder, "state.pt")
            )
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(numbers, checkpoint=checkpoint)


def restore(model: nn.Module, optimizer: distwd.Chain) -> int:
    """Go on from the newest checkpoint, if there is one; returns its step."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=WHOLE
    )
    return int(state["step"])


def run(options: argparse.Namespace) -> Result:
    trainer = TorchTrainer(
        train,
        train_loop_config={"steps": options.steps, "every": options.every, "weight_decay": options.weight_decay},
        torch_config=TorchConfig(backend="nccl" if options.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
        run_config=RunConfig(
            name="distwd", storage_path=str(options.out.resolve()), failure_config=FailureConfig(max_failures=2)
        ),
    )
    return trainer.fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="a GPU for each worker")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=20, help="steps from one report, and checkpoint, to the next")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("runs/ray"), help="a run that stopped there is gone on with")
    options = parser.parse_args()
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        # Without its dashboard, a Ray of our own would write every second that it cannot ask it.
        ray.init(num_cpus=options.workers, include_dashboard=False, log_to_driver=False)
    try:
        result = run(options)
    finally:
        ray.shutdown()
    print(f"{result.metrics}; checkpoint: {result.checkpoint and result.checkpoint.path}")


if __name__ == "__main__":
    main()
