"""Does the forward mix samples? Then no sample has a gradient of its own, and results would depend on the batching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastewc.importance.evaluate import Evaluated, logits_or_raw

# Relative L2 distance between one sample's output in company and alone. Other kernels for other batch sizes move it by
# a few roundings per layer: 1e-3 at most under TF32, a few percent in 16 bits or less. Shared statistics move it by
# tens of percent.
_TOLERANCE, _TOLERANCE_NARROW = 0.03, 0.2


def refuse_mixing(module: nn.Module, first: Evaluated, whole: Evaluated, what: str) -> None:
    """ValueError if :func:`mixes`."""
    if mixes(module, first, whole):
        raise ValueError(
            f"{what}: the forward mixes samples: the first sample's output is another in a batch of {whole.size} than "
            "alone, so it has no gradient of its own. Look for statistics over the batch (batch_norm with "
            "training=True, a mean over dimension 0), or for batch_dim; keep the samples apart, or give batches of one "
            "sample"
        )


def mixes(module: nn.Module, first: Evaluated, whole: Evaluated) -> bool:
    """True if the first sample's output in its batch clearly differs from its output alone.

    Outputs that are not one tensor with one entry per sample, or of another size alone, tell nothing.
    """
    together, alone = logits_or_raw(whole.raw), logits_or_raw(first.raw)
    if whole.size < 2 or not isinstance(alone, Tensor):
        return False
    if not (isinstance(together, Tensor) and together.is_floating_point()):
        return False
    for dim in {whole.batch_dim, 0}:
        if together.ndim <= dim or together.shape[dim] != whole.size:
            continue
        same = together.narrow(dim, 0, 1)
        if same.shape != alone.shape:
            continue
        typical = together.double().nan_to_num(0.0, 0.0, 0.0).norm().item() / whole.size**0.5
        difference = (same.double() - alone.double()).nan_to_num(0.0, 0.0, 0.0).norm().item()
        narrow = together.dtype.itemsize < 4 or computes_narrow(module, together.device)
        return bool(difference > (_TOLERANCE_NARROW if narrow else _TOLERANCE) * typical)
    return False


def computes_narrow(module: nn.Module, device: torch.device) -> bool:
    """True if the forward computes in less than 32 bits somewhere, and its roundings are percents."""
    narrow = any(tensor.dtype.itemsize < 4 for tensor in module.parameters())
    return narrow or torch.is_autocast_enabled(device.type)
