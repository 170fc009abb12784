"""Normalisations: x̂ · w + b, with x̂ formed anew in backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastewc.per_sample.rules.base import Call, Use, is_proxy, rule
from fastewc.per_sample.segments import Explicit, Segment, reduced_to, wide


def _affine(
    call: Call, x: Tensor, weight: object, bias: object, normalise: Callable[..., Tensor], *statistics: Tensor,
    channels: bool,
) -> list[Use]:  # fmt: skip
    """The uses of w and b; ``channels``: they belong to dimension 1, not to the last ones."""

    def last(t: Tensor) -> Tensor:
        return t.movedim(1, -1) if channels else t

    def of_weight(g: Tensor, x: Tensor, *statistics: Tensor) -> Segment:
        product = wide(g) * normalise(wide(x), *statistics)
        return Explicit(reduced_to(call.split(last(product)), weight.shape))  # type: ignore[attr-defined]

    def of_bias(g: Tensor, *_: Tensor) -> Segment:
        return Explicit(reduced_to(call.split(last(g)), bias.shape))  # type: ignore[attr-defined]

    uses = []
    if is_proxy(weight):
        uses.append(Use(weight.operand, (x, *statistics), of_weight))  # type: ignore[attr-defined]
    if is_proxy(bias):
        uses.append(Use(bias.operand, (), of_bias))  # type: ignore[attr-defined]
    return uses


@rule(torch.layer_norm)
def layer_norm(call: Call) -> list[Use] | None:
    """Over the last dimensions."""
    x, shape, weight, bias, eps = call.bound("input", "normalized_shape", "weight", "bias", "eps")
    if is_proxy(x) or call.layout.dim >= x.ndim - len(shape):
        return None
    eps = 1e-5 if eps is None else eps
    return _affine(
        call, x, weight, bias, lambda x: torch.layer_norm(x, shape, None, None, eps), channels=False
    )  # fmt: skip


@rule(torch.rms_norm)
def rms_norm(call: Call) -> list[Use] | None:
    """Over the last dimensions, without a mean and a bias."""
    x, shape, weight, eps = call.bound("input", "normalized_shape", "weight", "eps")
    if is_proxy(x) or call.layout.dim >= x.ndim - len(shape):
        return None
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(call, x, weight, None, lambda x: torch.rms_norm(x, shape, None, eps), channels=False)


@rule(torch.group_norm)
def group_norm(call: Call) -> list[Use] | None:
    """Over groups of channels."""
    x, groups, weight, bias, eps = call.bound("input", "num_groups", "weight", "bias", "eps")
    if is_proxy(x) or call.layout.dim != 0:
        return None
    eps = 1e-5 if eps is None else eps
    return _affine(
        call, x, weight, bias, lambda x: torch.group_norm(x, groups, None, None, eps), channels=True
    )  # fmt: skip


@rule(torch.instance_norm)
def instance_norm(call: Call) -> list[Use] | None:
    """Over each channel by itself, or with running statistics."""
    x, weight, bias, mean, var, own, _, eps, _ = call.bound(
        "input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps", "cudnn"
    )
    if is_proxy(x) or call.layout.dim != 0:
        return None
    if not own:
        return _by_statistics(call, x, weight, bias, mean, var, eps)

    def normalise(x: Tensor) -> Tensor:
        return torch.instance_norm(x, None, None, None, None, True, 0.0, eps, False)

    return _affine(call, x, weight, bias, normalise, channels=True)


@rule(torch.batch_norm)
def batch_norm(call: Call) -> list[Use] | None:
    """With running statistics; with those of the batch no sample has a gradient of its own."""
    x, weight, bias, mean, var, training, _, eps, _ = call.bound(
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"
    )
    if is_proxy(x) or training or call.layout.dim != 0 or mean is None:
        return None
    return _by_statistics(call, x, weight, bias, mean, var, eps)


def _by_statistics(
    call: Call, x: Tensor, weight: object, bias: object, mean: Tensor, var: Tensor, eps: float
) -> list[Use]:
    shape = (-1, *([1] * (x.ndim - 2)))

    def normalise(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        return (x - mean.view(shape)) * inverse.view(shape)

    return _affine(call, x, weight, bias, normalise, wide(mean), (wide(var) + eps).rsqrt(), channels=True)
