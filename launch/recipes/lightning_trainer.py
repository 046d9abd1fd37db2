"""Lightning's Trainer over FSDP2 (`ModelParallelStrategy`): decay, accumulation, clipping, saving and going on.

torchrun --nproc-per-node 2 launch/recipes/lightning_trainer.py --out runs/trainer
torchrun --nproc-per-node 2 launch/recipes/lightning_trainer.py --out runs/trainer --resume
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from small import ByteModel, leave, read_sequences
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from distwd import LR, Adam, Chain, RelativeWeightDecay, attach, param_groups

MICRO_BATCHES, STEPS, EPOCHS = 2, 3, 2  # steps per epoch


class Bytes(LightningModule):
    def __init__(self, decay: str) -> None:
        super().__init__()
        self.model = ByteModel()
        self.decay = decay

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if not isinstance(next(self.model.parameters()), DTensor):
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    # --8<-- [start:optimizer]
    def configure_optimizers(self) -> Any:
        # Sharded by now. Norms and biases do not decay.
        groups = param_groups(self.model, 0.1)
        optimizer: torch.optim.Optimizer
        if self.decay == "chain":
            optimizer = Chain(groups, Adam(), RelativeWeightDecay(), LR(1e-2))
        else:
            # The Trainer computes the gradients inside `step`;
            # attached decay waits for them, whatever it looks at.
            optimizer = torch.optim.AdamW(groups, lr=1e-2)
            in_gradient = self.decay == "attach to the gradient"
            attach(
                optimizer,
                RelativeWeightDecay(norm_input="grad", metric="l2"),
                coupling="gradient" if in_gradient else "lr",
            )
        scheduler = torch.optim.lr_scheduler.LinearLR(
            optimizer,
            start_factor=0.1,
            total_iters=4,
        )
        schedule = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # --8<-- [end:optimizer]

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch[0])
        return loss


def main(out: Path, decay: str, resume: bool) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = Trainer(
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=ranks // int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),
        max_epochs=EPOCHS,
        accumulate_grad_batches=MICRO_BATCHES,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(out, "{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Bytes(decay)
    loader = DataLoader(TensorDataset(read_sequences(STEPS * MICRO_BATCHES * ranks * 4)), batch_size=4)
    trainer.fit(module, loader, ckpt_path=str(out / "epoch=0.ckpt") if resume else None)

    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.model.named_parameters()}
    if trainer.is_global_zero:
        torch.save({name: p.detach().cpu() for name, p in whole.items()}, out / "model.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is saved")
    parser.add_argument("--decay", choices=["chain", "attach", "attach to the gradient"], default="attach")
    parser.add_argument("--resume", action="store_true", help="go on from the state that a run before has saved")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    main(options.out, options.decay, options.resume)
    leave()
