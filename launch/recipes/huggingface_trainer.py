"""Hugging Face's Trainer: one process, DDP, or FSDP2 (--fsdp); accumulation, clipping, saving and going on.

python launch/recipes/huggingface_trainer.py --out runs/hf
torchrun --nproc-per-node 2 launch/recipes/huggingface_trainer.py --out runs/hf --fsdp
torchrun --nproc-per-node 2 launch/recipes/huggingface_trainer.py --out runs/hf --fsdp --resume
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from small import leave, read_sequences
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from distwd import LR, Adam, Chain, RelativeWeightDecay, attach, param_groups

STEPS = 6


# --8<-- [start:attach]
class DecayingTrainer(Trainer):
    """Every kind of run calls `create_optimizer`."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        model = model or self.model
        optimizer = super().create_optimizer(model)
        # The Trainer's groups stay: no decay for norms and biases, and
        # args.weight_decay for all others, which is λ from here on.
        named, rule = model.named_parameters(), RelativeWeightDecay()
        attach(optimizer, rule, named_parameters=named, take_over=True)
        return optimizer


# --8<-- [end:attach]
# --8<-- [start:chain]
class ChainTrainer(Trainer):
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        model = model or self.model
        groups = param_groups(model, self.args.weight_decay)
        lr = LR(self.args.learning_rate)
        self.optimizer = Chain(groups, Adam(), RelativeWeightDecay(), lr)
        return self.optimizer


# --8<-- [end:chain]
TRAINERS: dict[str, type[Trainer]] = {"attach": DecayingTrainer, "chain": ChainTrainer}


def main(out: Path, decay: str, fsdp: bool, resume: bool) -> None:
    on_cpu = not torch.cuda.is_available()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=on_cpu,
        max_steps=STEPS,
        per_device_train_batch_size=8 // ranks,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        optim="adamw_torch",  # the default is fused, whose bits depend on where a tensor is cut
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=2,
        save_steps=STEPS // 2,
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        fsdp=fsdp,  # type: ignore[arg-type]
        fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"}
        if fsdp
        else None,
    )
    if on_cpu and fsdp:
        # accelerate, which shards for the Trainer, does so over accelerators only. CPU ranks take the same way if called GPUs.
        PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    config.bos_token_id = config.eos_token_id = None
    model = LlamaForCausalLM(config)
    data = [{"input_ids": text, "labels": text} for text in read_sequences(8 * 2 * STEPS)]
    trainer = TRAINERS[decay](model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{STEPS // 2}") if resume else None)

    named = trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters()
    whole = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for name, p in named}
    if trainer.is_world_process_zero():
        torch.save(whole, out / "model.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is saved")
    parser.add_argument("--decay", choices=TRAINERS, default="attach")
    parser.add_argument("--fsdp", action="store_true", help="shard with FSDP2 (under torchrun)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint that a run before has saved")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    main(options.out, options.decay, options.fsdp, options.resume)
    leave()
