"""A byte-level GPT-2 that has learned a book, and the plays that it is fine-tuned on: what several benchmarks share.

Shapes: N samples, T positions; a sample is one window of a text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastewc
from benchmarks.importance.workloads import gpt2

DOMAINS = {"book": "war_and_peace.txt", "plays": "tinyshakespeare.txt"}
HELD_OUT = 0.05  # of each text, its end


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model, its batches of N × T bytes, and how it learns the book."""

    layers: int
    width: int
    positions: int
    batch: int
    book_steps: int
    book_lr: float
    held_out_samples: int


@dataclass(frozen=True)
class Text:
    """The bytes of a text, int64 [·], in two parts."""

    train: Tensor
    held_out: Tensor


def read_texts(data_root: str | None, device: str = "cpu") -> dict[str, Text]:
    """Both texts; ValueError where there is no folder."""
    if data_root is None:
        raise ValueError("no data folder: give --data-root PATH or set FASTEWC_DATA; it holds text/*.txt")
    texts = {}
    for domain, name in DOMAINS.items():
        data = torch.frombuffer(bytearray(Path(data_root, "text", name).read_bytes()), dtype=torch.uint8).long()
        cut = int(len(data) * (1 - HELD_OUT))
        texts[domain] = Text(data[:cut].to(device), data[cut:].to(device))
    return texts


def batches(data: Tensor, sizes: Sizes, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) [N, T] from places drawn with the seed; y is x one byte later."""
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(data) - sizes.positions - 1, (sizes.batch, 1), generator=gen)
        windows = data[(starts + torch.arange(sizes.positions + 1)).to(data.device)]
        yield windows[:, :-1], windows[:, 1:]


def token_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over all positions, in float32."""
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def held_out_loss(model: nn.Module, text: Text, sizes: Sizes) -> float:
    """Nats a byte over windows that lie side by side, in float32 whatever the model is in."""
    wide = copy.deepcopy(model).float()
    length = sizes.positions + 1
    count = min(len(text.held_out) // length, sizes.held_out_samples)
    windows = text.held_out[: count * length].view(count, length)
    with torch.no_grad():
        losses = [token_loss(wide, part[:, :-1], part[:, 1:]) * len(part) for part in windows.split(sizes.batch)]
    return float(torch.stack(losses).sum() / count)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step on one batch."""
    optimizer.zero_grad()
    token_loss(model, x, y).backward()
    optimizer.step()


def build_gpt(sizes: Sizes) -> nn.Module:
    """An untrained model: bytes [N, T] → logits [N, T, 256], the head tied to the embedding, learned positions."""
    return gpt2(sizes.layers, sizes.width, max(1, sizes.width // 32), 256, sizes.positions)


def learn_the_book(text: Text, sizes: Sizes) -> nn.Module:
    """A model trained in float32 with a linear warm-up and decay, in eval mode on the text's device."""
    torch.manual_seed(0)
    model = build_gpt(sizes).to(text.train.device)
    optimizer = fastewc.optim.AdamW(model.parameters(), lr=sizes.book_lr, weight_decay=0.01)
    warm = max(1, sizes.book_steps // 20)
    for step, (x, y) in enumerate(batches(text.train, sizes, sizes.book_steps, seed=0)):
        share = min((step + 1) / warm, (sizes.book_steps - step) / (sizes.book_steps - warm + 1))
        optimizer.param_groups[0]["lr"] = sizes.book_lr * share
        train_step(model, optimizer, x, y)
    return model.eval()
