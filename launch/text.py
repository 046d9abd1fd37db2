"""Bytes of text as training data: read, split, and drawn in an order that a checkpoint can go on with."""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path

import torch

STRETCH = 4096  # bytes of text that are kept together


def read_text(files: list[str] | None) -> bytes:
    """The bytes of `files`, one after the other; left out, the English documentation that CPython carries."""
    if files:
        return b"\n".join(Path(file).read_bytes() for file in files)
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def fingerprint(text: bytes) -> str:
    """Short, and different for different texts: to see that all ranks read the same."""
    return f"{len(text)} bytes, checksum {zlib.crc32(text):08x}"


class Sequences:
    """Draws sequences of `context + 1` bytes: `context` inputs, each with the byte that follows it.

    The text is cut into blocks; each epoch reads every block once, in an order that depends on the seed and the
    number of the epoch alone. So `position`, the number of sequences drawn so far, is all there is to save.
    Every rank draws the same sequences, so a run reads the same data however many ranks share the work.
    """

    def __init__(self, text: bytes, context: int, seed: int | None) -> None:
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context
        self.seed = seed
        self.position = 0
        if len(self) < 1:
            raise ValueError(
                f"{len(text)} bytes are too few for a sequence of {context}; "
                "use more text, a smaller --context or another --val-share"
            )

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def draw(self, count: int) -> torch.Tensor:
        """The next `count` sequences: (count, context + 1), int64."""
        starts = torch.tensor([self._start(self.position + i) for i in range(count)])
        self.position += count
        return self.data[starts[:, None] + torch.arange(self.context + 1)].long()

    def _start(self, number: int) -> int:
        epoch, index = divmod(number, len(self))
        return int(block_order(len(self), self.seed, epoch)[index]) * self.context


@lru_cache(maxsize=2)
def block_order(num_blocks: int, seed: int | None, epoch: int) -> torch.Tensor:
    """The blocks in the order in which this epoch reads them; without a seed, as they stand in the text."""
    if seed is None:
        return torch.arange(num_blocks)
    return torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def split_text(text: bytes, share: float) -> tuple[bytes, bytes]:
    """(for training, for validation): whole stretches of the text, evenly spread, are kept for validation.

    Its end alone would be about something else than the rest; single sequences would lie too close to those trained on.
    """
    if share == 0:
        return text, b""
    length = max(1, min(STRETCH, int(len(text) * share)))
    stretches = [text[start : start + length] for start in range(0, len(text), length)]
    period = round(1 / share)
    first = min(period // 2, len(stretches) - 1)
    validation = stretches[first::period]
    del stretches[first::period]
    return b"".join(stretches), b"".join(validation)
