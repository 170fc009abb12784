"""The models whose importances are measured, and the batches they are shown.

Every model maps x [N, ...] to logits [N, ..., C]; y [N, ...] holds their classes. A sample is one index of N.
Shapes: N samples, T tokens, C classes, S pixels a side.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.mnist_tasks import Split, load_mnist
from benchmarks.paper.protocol import build_mlp

Batch = tuple[Tensor, Tensor]
Draw = Callable[[int, "str | None"], tuple[Batch, str]]


class Missing(NotImplementedError):
    """A library that this workload or contender needs is not installed; the text names the one."""


@dataclass(frozen=True)
class Spec:
    """One model and how it is fed.

    Attributes:
        build: makes the model.
        draw: (samples, data root or None) → ((x, y), where they come from); None: random ones.
        samples: N of the whole pass.
        batch: samples in each batch.
        autocast: forward in bfloat16 autocast.
    """

    build: Callable[[], nn.Module]
    draw: Draw
    samples: int
    batch: int
    autocast: bool = False


@dataclass(frozen=True)
class Workload:
    """A model in eval mode on its device, with its batches in memory."""

    name: str
    model: nn.Module
    batches: list[Batch]
    source: str
    autocast: bool = False

    @property
    def device(self) -> torch.device:
        return self.batches[0][0].device

    @property
    def weights(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def precision(self) -> AbstractContextManager[Any]:
        """What every forward runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)


class Logits(nn.Module):
    """A Hugging Face language model as a function of its tokens alone."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, ids: Tensor) -> Tensor:
        """ids [N, T] → logits [N, T, C]."""
        return self.language_model(ids, use_cache=False).logits


def gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int) -> nn.Module:
    """GPT-2 of any size with its head tied to its embedding; without dropout, so that train mode is no other."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise Missing("transformers is not installed: pip install 'fastewc[bench]'") from error
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Logits(GPT2LMHeadModel(config))


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """A model of torchvision with random weights."""
    try:
        from torchvision import models
    except ImportError as error:
        raise Missing("torchvision is not installed: pip install 'fastewc[bench]'") from error
    constructor = models.VisionTransformer if name == "vit" else getattr(models, name)
    return constructor(**options)


@functools.lru_cache(maxsize=1)
def mnist(data_root: str) -> Split:
    """MNIST, read once."""
    return load_mnist(data_root)


def pictures(shape: tuple[int, ...], samples: int, data_root: str | None) -> tuple[Batch, str]:
    """The last training images of MNIST, as the paper takes them: flat [784], or enlarged to [3, S, S]."""
    if data_root is None:
        return (torch.rand(samples, *shape), torch.randint(10, (samples,))), "random"
    data = mnist(data_root)
    x, y = data.train_x[-samples:], data.train_y[-samples:]
    if len(shape) == 3:
        x = F.interpolate(x.view(-1, 1, 28, 28), size=shape[-1]).expand(-1, *shape).contiguous()
    return (x, y), "MNIST"


def texts(tokens: int, vocabulary: int, samples: int, data_root: str | None) -> tuple[Batch, str]:
    """Pieces of a text with one token for each of its most frequent words; y is x one word later."""
    found = sorted(Path(data_root, "text").glob("*.txt")) if data_root else []
    if not found:
        ids, source = torch.randint(vocabulary, (samples, tokens + 1)), "random"
    else:
        words = re.findall(r"\w+|[^\w\s]", found[0].read_text(encoding="utf-8"))[: samples * (tokens + 1)]
        known = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
        ids, source = torch.tensor([known.get(word, 0) for word in words]).view(samples, tokens + 1), found[0].name
    return (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), source


def _mlp(batch: int) -> Spec:
    return Spec(partial(build_mlp, 784, (300, 150), 10), partial(pictures, (784,)), 5000, batch)


def _vision(model: str, size: int, samples: int, batch: int, autocast: bool = False, **options: Any) -> Spec:
    build = partial(torchvision_model, model, **options)
    return Spec(build, partial(pictures, (3, size, size)), samples, batch, autocast)


def _gpt2(layers: int, width: int, heads: int, classes: int, tokens: int, samples: int, batch: int, amp: bool) -> Spec:
    return Spec(
        partial(gpt2, layers, width, heads, classes, tokens), partial(texts, tokens, classes), samples, batch, amp
    )


_TINY_VIT = {"patch_size": 8, "num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
SPECS: dict[str, Spec] = {
    "mlp-b100": _mlp(100),
    "mlp-b1000": _mlp(1000),
    "mlp-b5000": _mlp(5000),
    "resnet18-b16": _vision("resnet18", 64, 256, 16),
    "resnet18-b32": _vision("resnet18", 64, 256, 32),
    "vit-tiny-b16": _vision("vit", 64, 256, 16, image_size=64, **_TINY_VIT),
    "gpt2-4x256-t256-b8": _gpt2(4, 256, 4, 5000, 256, 64, 8, False),
    "gpt2-4x256-t32-b64": _gpt2(4, 256, 4, 5000, 32, 512, 64, False),
    "gpt2-124m-t1024-b8": _gpt2(12, 768, 12, 50257, 1024, 16, 8, True),
    "vit-b-16-b64": _vision("vit_b_16", 224, 128, 64, True),
    "resnet50-b64": _vision("resnet50", 224, 128, 64, True),
}
#: What a device measures unless told otherwise.
DEFAULTS = {
    "cpu": [name for name, spec in SPECS.items() if not spec.autocast],
    "cuda": ["mlp-b1000", *(name for name, spec in SPECS.items() if spec.autocast)],
}


def data_root_or_none(given: str | None) -> str | None:
    """The folder from the command line or FASTEWC_DATA; None: random data."""
    return given or os.environ.get("FASTEWC_DATA") or None


def make(name: str, device: str, data_root: str | None) -> Workload:
    """Model and batches of one spec, the same at every call."""
    spec = SPECS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build()
        (x, y), source = spec.draw(spec.samples, data_root)
    model.to(device).eval()
    x, y = x.to(device), y.to(device)
    with settling(model):
        model(x[: spec.batch])
    batches = list(zip(x.split(spec.batch), y.split(spec.batch), strict=True))
    return Workload(name, model, batches, source, spec.autocast)


@contextmanager
def settling(model: nn.Module) -> Iterator[None]:
    """Let batch norms take the statistics of what is shown inside: at the initial ones activations double per block."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def chunks(batches: Sequence[Batch], size: int) -> Iterator[Batch]:
    """The same samples in pieces of at most ``size``, for who keeps a gradient per sample."""
    for x, y in batches:
        yield from zip(x.split(size), y.split(size), strict=True)
