"""Does the forward mix samples? Then no sample has a gradient of its own, and results would depend on the batching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastewc.importance.evaluate import Evaluated, logits_or_raw

# Relative L2 distance between one sample's output in company and alone. Other kernels for other batch sizes move it by
# a few roundings per layer: 1e-3 at most under TF32, a few percent in 16 bits or less. Shared statistics move it by
# tens of percent, a mean over the batch at the side by less.
_TOLERANCE, _TOLERANCE_TF32, _TOLERANCE_NARROW = {torch.float64: 1e-4, torch.float32: 3e-3}, 0.03, 0.2


def refuse_mixing(module: nn.Module, first: Evaluated, whole: Evaluated, what: str) -> None:
    """ValueError if :func:`mixes`."""
    if mixes(module, first, whole):
        raise ValueError(
            f"{what}: the forward mixes samples: the first sample's output (or loss) is another in a batch of "
            f"{whole.size} than alone, so it has no gradient of its own. Look for statistics over the batch "
            "(batch_norm with training=True, a mean over dimension 0), products of samples with each other, or for "
            "batch_dim; keep the samples apart, or give batches of one sample"
        )


def mixes(module: nn.Module, one: Evaluated, whole: Evaluated, index: int = 0) -> bool:
    """True if a sample's output in its batch clearly differs from its output alone: the one at ``index``.

    Outputs that are not one tensor with one entry per sample, or of another size alone, tell nothing; but a size that
    is the number of samples does: they meet each other.
    """
    together, alone = logits_or_raw(whole.raw), logits_or_raw(one.raw)
    if whole.size < 2 or not isinstance(alone, Tensor):
        return False
    if not (isinstance(together, Tensor) and together.is_floating_point()):
        return False
    grows = False
    for dim in {whole.batch_dim, 0}:
        if together.ndim <= dim or together.shape[dim] != whole.size:
            continue
        same = together.narrow(dim, index, 1)
        if same.shape != alone.shape:
            sizes = zip(same.shape, alone.shape, strict=True) if same.ndim == alone.ndim else ()
            grows = grows or any(sizes_of == (whole.size, 1) for sizes_of in sizes)
            continue
        difference, size = _norm(same.double() - alone.double()), _norm(alone)
        tolerance = _tolerance(module, together)
        if difference <= tolerance * size:  # the other samples need not be looked at
            return False
        return bool(difference > tolerance * _norm(together) / whole.size**0.5)
    return grows


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().nan_to_num(0.0, 0.0, 0.0).norm())


def _tolerance(module: nn.Module, output: Tensor) -> float:
    if output.dtype.itemsize < 4 or computes_narrow(module, output.device):
        return _TOLERANCE_NARROW
    exact = output.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return _TOLERANCE[output.dtype] if exact else _TOLERANCE_TF32


def computes_narrow(module: nn.Module, device: torch.device) -> bool:
    """True if the forward computes in less than 32 bits somewhere, and its roundings are percents."""
    narrow = any(tensor.dtype.itemsize < 4 for tensor in module.parameters())
    return narrow or torch.is_autocast_enabled(device.type)
