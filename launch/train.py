r"""Train a small Llama on bytes of text, sharded over any mesh, with weight decay from distwd.

    python launch/train.py                                                       one process, no sharding
    torchrun --nproc-per-node 2 launch/train.py                                  FSDP2 over 2 ranks
    torchrun --nproc-per-node 4 launch/train.py --mesh dp=2,fsdp=2               HSDP
    torchrun --nproc-per-node 4 launch/train.py --mesh fsdp=2,tp=2               FSDP2 over tensor parallelism
    torchrun --nproc-per-node 2 launch/train.py --decay relative --metric rms --norm-input params --check
    torchrun --nproc-per-node 2 launch/train.py --checkpoint runs/saved --save-every 100 --resume
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 3 launch/train.py \
        --checkpoint runs/saved --save-every 100 --resume                        goes on by itself after a rank has died

CUDA and nccl where there is a GPU, else CPU and gloo. Nothing is downloaded: the weights are random, and the text is
the documentation inside CPython unless --text names files. See --help for the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    import checkpoint
    import torch
    from journal import Journal, Stopwatch, as_numbers
    from model import build_model, check_divisible, cross_entropy, shard_model_
    from options import make_optimizer, parse_options
    from replica import Replica
    from text import Sequences, fingerprint, read_text, split_text
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
    from world import World, end_process, start_world

    import distwd
except ModuleNotFoundError as error:
    sys.exit(f"train.py: {error}; install what the program needs with: pip install -e '.[demo]'")


class Trainer:
    """A run: what it consists of, one step, and what is told and saved along the way."""

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        self.options = options
        self.world = world
        self.step = 0
        self.record: dict[str, Any] | None = None  # the last line of the log
        world.together(self._load_text)
        world.together(self._build)
        found = world.gather(world.together(self._find_checkpoint))[0]
        if found is not None:
            self._restore(found)
        elif options.resume:
            world.say(f"no checkpoint in {options.checkpoint} yet: starting anew")
        self.start = self.step
        self.saver = checkpoint.Saver(Path(options.checkpoint), options.async_save) if options.checkpoint else None
        self.replica = Replica(self.model, self.optimizer, self._make_optimizer) if options.check else None
        self.journal = Journal(Path(options.out), world.is_main, self.step, options.steps)
        self.watch = Stopwatch(world.device)

    # --- setting up -------------------------------------------------------------------------------------------------

    def _load_text(self) -> None:
        options = self.options
        text = read_text(options.text)
        train, validation = split_text(text, options.val_share)
        self.data = Sequences(train, options.context, options.seed)
        self.validation = Sequences(validation, options.context, seed=None) if options.val_share else None
        self.text = fingerprint(text)

    def _build(self) -> None:
        """The model, then the optimizer over its shards, by name. Raises ValueError on settings that do not fit."""
        options, world = self.options, self.world
        self._check_layout()
        self.model = build_model(
            options.layers, options.hidden, options.heads, options.mlp, options.context, options.seed, world.device
        )
        shard_model_(self.model, world.mesh)
        self.params = list(self.model.parameters())
        self.optimizer = self._make_optimizer(self.model.named_parameters())
        self.plan = self.optimizer.plan  # the ranks find out now, before the first step, who holds what
        self.scheduler = self._make_scheduler()

    def _check_layout(self) -> None:
        options, world = self.options, self.world
        texts = set(world.gather(self.text))
        if len(texts) > 1:
            raise ValueError(
                f"the ranks do not read the same text ({' / '.join(sorted(texts))}); give all the same files"
            )
        check_divisible(world.mesh, options.heads, options.mlp)
        if options.batch_size % (world.num_readers * options.accumulate):
            raise ValueError(
                f"--batch-size {options.batch_size} cannot be cut into {options.accumulate} micro-batches (--accumulate) "
                f"for {world.num_readers} data-parallel ranks; make it a multiple of "
                f"{world.num_readers * options.accumulate}"
            )
        if self.validation is not None and len(self.validation) < world.num_readers:
            raise ValueError(
                f"{len(self.validation)} validation sequences are too few for {world.num_readers} data-parallel ranks; "
                "raise --val-share, or set it to 0"
            )

    def _make_optimizer(self, named_params: Iterable[tuple[str, torch.Tensor]], group: Any = None) -> Any:
        return make_optimizer(named_params, self.options, group)

    def _make_scheduler(self) -> SequentialLR:
        """Up in a line, then down half a cosine. Each factor is of `lr` alone; decay follows from its place."""
        options = self.options
        warmup = min(options.warmup, options.steps)
        up = LinearLR(self.optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        down = CosineAnnealingLR(
            self.optimizer, T_max=max(1, options.steps - warmup), eta_min=options.lr * options.lr_end
        )
        return SequentialLR(self.optimizer, [up, down], milestones=[warmup])

    # --- a checkpoint -----------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Path | None:
        """Rank 0 looks, and all take its word, so that a slow file system cannot part them."""
        if self.options.checkpoint is None:
            return None
        folder, found = Path(self.options.checkpoint), None
        if self.world.is_main:
            found = checkpoint.find(folder, self.options.resume)
        return found

    def _progress(self) -> dict[str, Any]:
        return {"step": self.step, "position": self.data.position, "scheduler": self.scheduler.state_dict()}

    def _restore(self, path: Path) -> None:
        progress = checkpoint.load(path, self.model, self.optimizer, self._progress())
        self.step = progress["step"]
        self.data.position = progress["position"]
        self.scheduler.load_state_dict(progress["scheduler"])
        self.world.say(f"resumed from {path}")

    # --- one step ---------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the end; whether the replica, if there is one, agrees."""
        options = self.options
        last = min(options.steps, self.start + (options.stop_after or options.steps))
        while self.step < last:
            self._take_step(is_last=self.step + 1 == last)
            if self.saver is not None and (self.step == last or self._every(options.save_every)):
                self.saver.save(self.step, self.model, self.optimizer, self._progress())
        return self._finish()

    def _take_step(self, is_last: bool) -> None:
        options = self.options
        lr = self.optimizer.param_groups[0]["lr"]
        loss = self._accumulate_gradients()
        if options.clip is not None:
            distwd.clip_grad_norm_(self.params, options.clip, plan=self.plan)
        if self.replica is not None:
            self.replica.step()
        self.step += 1
        validate = self.validation is not None and (is_last or self._every(options.val_every))
        if validate or is_last or self._every(options.log_every):
            with CommDebugMode() as collectives:
                self.optimizer.step()
            self._tell(loss, lr, collectives.get_total_counts(), validate)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.journal.advance()

    def _every(self, steps: int | None) -> bool:
        return steps is not None and self.step % steps == 0

    def _batches(self) -> torch.Tensor:
        """This rank's part of the next batch: (micro-batches, sequences, context + 1)."""
        options, world = self.options, self.world
        whole = self.data.draw(options.batch_size)
        parts = whole.view(options.accumulate, world.num_readers, -1, options.context + 1)
        return parts[:, world.reader].to(world.device)

    def _accumulate_gradients(self) -> torch.Tensor:
        """Backward through every micro-batch; returns the mean loss of this rank's part."""
        batches = self._batches()
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches, start=1):
            if isinstance(self.model, FSDPModule):
                # Gradients meet the other ranks once a step, after the last micro-batch.
                self.model.set_requires_gradient_sync(number == len(batches))
            loss = self._loss(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        self.watch.tokens += self.options.batch_size * self.options.context
        return total

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.options.bf16):
            return cross_entropy(self.model, batch)

    @torch.no_grad()
    def _validation_loss(self, validation: Sequences) -> float:
        """The mean loss over the same sequences each time, shared among the ranks."""
        world = self.world
        count = min(self.options.val_sequences, len(validation)) // world.num_readers or 1
        validation.position = 0
        whole = validation.draw(count * world.num_readers)
        mine = whole[world.reader :: world.num_readers].to(world.device)
        size = self.options.batch_size // (world.num_readers * self.options.accumulate)
        total = torch.zeros((), device=world.device)
        for batch in mine.split(size):
            total += self._loss(batch) * len(batch)
        return float(world.mean(total / count))

    # --- telling ----------------------------------------------------------------------------------------------------

    def _tell(self, loss: torch.Tensor, lr: float, collectives: int, validate: bool) -> None:
        speed = self.watch.look()
        self.record = {
            "step": self.step,
            "loss": float(self.world.mean(loss)),
            "val_loss": self._validation_loss(self.validation) if self.validation and validate else None,
            "lr": float(lr),
            **self._decay_numbers(),
            "param_norm": float(self.plan.metric(self.params, "l2")),
            "tokens_per_s": round(speed, 1),
            "collectives": collectives,
        }
        self.journal.write(self.record)
        self.watch.look()  # what was just told took time, too, and is not training

    def _decay_numbers(self) -> dict[str, Any]:
        """What the rule measured and decayed by. A rule that measures nothing decays by its weight_decay."""
        stats: dict[str, Any] = next(iter(self.optimizer.stats().values()), {})
        constant = self.optimizer.param_groups[0].get("weight_decay", 0.0) if self.options.decay != "none" else 0.0
        return {
            "metric": as_numbers(stats.get("metric")),
            # Norm rules multiply the parameter instead.
            "coefficient": as_numbers(stats.get("coefficient", stats.get("gain", constant))),
        }

    def _finish(self) -> bool:
        if self.saver is not None:
            self.saver.finish()
        verdict = self.replica.compare() if self.replica is not None else None
        summary = {
            "options": vars(self.options),
            "parameters": self.plan.numel,
            "text": self.text,
            "last": self.record,
            "check": verdict.as_dict() if verdict is not None else None,
        }
        self.journal.close(summary)
        if verdict is not None:
            self.world.say(f"check: {verdict}")
        return verdict is None or verdict.parameters_differ == 0


def main() -> int:
    """0 if all went well, 1 if the replica disagrees, 2 if the command line or the surroundings make no sense."""
    options = parse_options()
    with start_world(options.mesh, options.threads) as world:
        trainer = Trainer(options, world)
        if options.print_plan:
            world.say(str(trainer.plan))
        return 0 if trainer.run() else 1


if __name__ == "__main__":
    end_process(main())
