"""Normalisations: x̂ · w + b with x̂ = (x − shift) · factor, which is never formed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastewc.ops.sum_grad_power import row_moments
from fastewc.per_sample.rules.base import Call, Use, is_proxy, rule
from fastewc.per_sample.segments import Scale, Segment, wide

Moments = tuple[Tensor | None, Tensor]


def _affine(
    call: Call, x: Tensor, weight: object, bias: object, moments: Callable[..., Moments], *statistics: Tensor,
    channels: bool,
) -> list[Use]:  # fmt: skip
    """The uses of w and b. ``channels``: they belong to dimension 1, not to the last ones.

    ``moments(x, *statistics)`` gives shift and factor, of as many dimensions as x.
    """

    def of_samples(t: Tensor) -> Tensor:
        return call.split(t.movedim(1, -1) if channels else t)

    def of_weight(g: Tensor, x: Tensor, *statistics: Tensor) -> Segment:
        spread = (None if t is None else of_samples(t.expand(x.shape)) for t in moments(x, *statistics))
        return Scale(of_samples(g), tuple(weight.shape), of_samples(x), *spread)  # type: ignore[attr-defined]

    def of_bias(g: Tensor, *_: Tensor) -> Segment:
        return Scale(of_samples(g), tuple(bias.shape))  # type: ignore[attr-defined]

    uses = []
    if is_proxy(weight):
        uses.append(Use(weight.operand, (x, *statistics), of_weight))  # type: ignore[attr-defined]
    if is_proxy(bias):
        uses.append(Use(bias.operand, (), of_bias))  # type: ignore[attr-defined]
    return uses


def _of_rows(x: Tensor, dims: int, eps: float, *, centred: bool = True) -> Moments:
    """Those of the last dimensions."""
    shape = (*x.shape[: x.ndim - dims], *([1] * dims))
    shift, factor = row_moments(x.flatten(x.ndim - dims), eps, centred=centred)
    return shift.view(shape) if centred else None, factor.view(shape)


def _of_groups(x: Tensor, groups: int, eps: float) -> Moments:
    """Those of groups of channels, for each channel."""
    N, C = x.shape[:2]

    def each(t: Tensor) -> Tensor:
        return t.expand(N, groups, C // groups).reshape(N, C, *([1] * (x.ndim - 2)))

    shift, factor = row_moments(x.reshape(N, groups, -1), eps)
    return each(shift), each(factor)


@rule(torch.layer_norm, leading=True)
def layer_norm(call: Call) -> list[Use] | None:
    """Over the last dimensions."""
    x, shape, weight, bias, eps = call.bound("input", "normalized_shape", "weight", "bias", "eps")
    if is_proxy(x) or call.layout.dim >= x.ndim - len(shape):
        return None
    eps = 1e-5 if eps is None else eps
    return _affine(call, x, weight, bias, lambda x: _of_rows(x, len(shape), eps), channels=False)


@rule(torch.rms_norm, leading=True)
def rms_norm(call: Call) -> list[Use] | None:
    """Over the last dimensions, without a mean and a bias."""
    x, shape, weight, eps = call.bound("input", "normalized_shape", "weight", "eps")
    if is_proxy(x) or call.layout.dim >= x.ndim - len(shape):
        return None
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(call, x, weight, None, lambda x: _of_rows(x, len(shape), eps, centred=False), channels=False)


@rule(torch.group_norm)
def group_norm(call: Call) -> list[Use] | None:
    """Over groups of channels."""
    x, groups, weight, bias, eps = call.bound("input", "num_groups", "weight", "bias", "eps")
    if is_proxy(x) or call.layout.dim != 0:
        return None
    eps = 1e-5 if eps is None else eps
    return _affine(call, x, weight, bias, lambda x: _of_groups(x, groups, eps), channels=True)


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
    return _affine(call, x, weight, bias, lambda x: _of_groups(x, x.shape[1], eps), channels=True)


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
    def moments(x: Tensor, mean: Tensor, inverse: Tensor) -> Moments:
        shape = (-1, *([1] * (x.ndim - 2)))
        return mean.view(shape), inverse.view(shape)

    return _affine(call, x, weight, bias, moments, wide(mean), (wide(var) + eps).rsqrt(), channels=True)
