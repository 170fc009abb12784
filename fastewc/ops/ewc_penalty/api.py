"""The EWC penalty over many tensors: value, gradient and statistics; contract and choice of implementation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastewc._dispatch import choose
from fastewc._offload import Part, Stage, can_cut
from fastewc.ops.ewc_penalty.schema import Lr, lrs_of
from fastewc.ops.importance_codes import Codes, split

VARIANTS = ("plain", "stabilized")


def ewc_penalty(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    *,
    ewc_lambda: float,
    lrs: Sequence[Lr],
    variant: str,
    impl: str = "auto",
    stage: Stage | None = None,
) -> Tensor:
    """½ Σ c (w − w*)² over all tensors, differentiable by the parameters: one pass forward, one backward.

    c = λΩ for ``variant="plain"`` (E1: Kirkpatrick et al. 2017, eq. 3) and λΩ/(1 + αλΩ) for ``"stabilized"``
    (E2: Kutalev & Lapina 2021). The gradient by w is c (w − w*); importances, anchors, λ and lr are constants.

    Args:
        params: weights w, any float dtype, shape and device.
        importances: Ω ≥ 0, one per parameter, of its shape and device; float32, or float64 for float64 parameters,
            bfloat16, or codes of one byte.
        anchors: w*, one per parameter, of its shape and device, any float dtype.
        ewc_lambda: λ ≥ 0.
        lrs: α per parameter, a float or 0-dim tensor; None is allowed for ``"plain"`` only.
        variant: "plain" or "stabilized".
        impl: "auto", "reference", "triton" or "native"; only "auto" may choose.
        stage: what brings importances and anchors to a device, piece by piece, where they are on the host; the value is
            then the sum of the pieces'.

    Returns:
        0-dim tensor on the first parameter's device, float32 (float64 if any importance is float64).

    Raises:
        ValueError: lists of different length, shapes or devices that do not match, unknown variant, lr missing.
        NotImplementedError: ``impl`` cannot run here (says why).
    """
    _check(params, importances, anchors, lrs, variant, stage)
    omegas, scales = split(importances)
    constants = ewc_lambda, tuple(lrs), variant, impl, stage, len(params)
    value: Tensor = _Penalty.apply(*constants, *params, *omegas, *anchors, *scales)
    return value


def ewc_penalty_grads(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    *,
    ewc_lambda: float,
    lrs: Sequence[Lr],
    variant: str,
    grads: Sequence[Tensor] = (),
    negate: bool = False,
    scale: Tensor | None = None,
    impl: str = "auto",
    stage: Stage | None = None,
) -> list[Tensor]:
    """The pull c (w − w*) that :func:`ewc_penalty` adds to each gradient. Errors as there.

    Args:
        params: as in :func:`ewc_penalty`.
        importances: as there.
        anchors: as there.
        ewc_lambda: as there.
        lrs: as there.
        variant: as there.
        grads: gradients to add it to; empty for the pull alone.
        negate: −c (w − w*), for optimizers that maximise.
        scale: 0-dim factor of the pull, e.g. that of GradScaler; None for 1.
        impl: as in :func:`ewc_penalty`.
        stage: as there.

    Returns:
        New tensors of the gradients' dtypes (of the parameters' without ``grads``). A finite float16 gradient stays
        finite: what the pull would push beyond ±65504 ends there.
    """
    _check(params, importances, anchors, lrs, variant, stage)
    results: dict[int, Tensor] = {}
    for call in _calls(params, [importances, anchors], lrs, impl, stage, grads):
        own = call.of(grads)
        factor = None if scale is None else scale.to(call.device)
        pulled = call.kernels.ewc_penalty_grads(*call.held, own, ewc_lambda, *call.alphas, variant, negate, factor)
        for part, result in zip(call.parts, pulled, strict=True):
            if part.whole:
                results[part.row] = result
            else:
                like = (grads or params)[part.row]
                if part.begin == 0:
                    results[part.row] = torch.empty_like(like, requires_grad=False)
                part.of(results[part.row]).copy_(result)
    return [results[i] for i in range(len(params))]


def ewc_hold_back_(
    params: Sequence[Tensor],
    targets: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    *,
    ewc_lambda: float,
    lrs: Sequence[float | Tensor],
    skip: Tensor | None = None,
    impl: str = "auto",
    stage: Stage | None = None,
    stage_targets: bool = True,
) -> None:
    """E3 and E4 in place, after the optimizer's own update: w moves αλΩ/(1 + αλΩ) of the way to its target.

    E3 (proximal): target = w*. E4 (WVA, Kutalev 2020): target = the weight before the step. Where ``skip`` (0-dim) is
    not 0 nothing changes. ``stage_targets=False``: the targets need not be brought, they are beside the weights. The
    rest, and errors, as in :func:`ewc_penalty`.
    """
    _check(params, importances, targets, lrs, "stabilized", stage)
    columns, given = ([importances, targets], ()) if stage_targets else ([importances], targets)
    for call in _calls(params, columns, lrs, impl, stage, given):
        own, omegas, *rest = call.held
        flag = None if skip is None else skip.to(call.device)
        call.kernels.ewc_hold_back_(own, *(rest or [call.of(targets)]), omegas, ewc_lambda, *call.alphas, flag)
        torch.autograd.graph.increment_version(own)


def ewc_stats(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    *,
    ewc_lambda: float,
    lrs: Sequence[float | Tensor],
    variant: str,
    impl: str = "auto",
    stage: Stage | None = None,
) -> dict[str, float]:
    """What the penalty does to these weights, in one pass and one transfer to the host; see fastewc.EWC.stats."""
    from fastewc.ops.ewc_penalty import reference

    _check(params, importances, anchors, lrs, variant, stage)
    parts = [
        call.kernels.ewc_stats_terms(*call.held, ewc_lambda, *call.alphas, variant)
        for call in _calls(params, [importances, anchors], lrs, impl, stage)
    ]
    return reference.finish_stats(reference.merge_stats_terms(torch.stack([part.cpu() for part in parts])))


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ewc_lambda: float,
        lrs: tuple[Lr, ...],
        variant: str,
        impl: str,
        stage: Stage | None,
        n: int,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.constants = ewc_lambda, lrs, variant, impl, stage, n
        params, importances, anchors = _lists_of(tensors, n)
        parts = [
            call.kernels.ewc_penalty_value(*call.held, ewc_lambda, *call.alphas, variant)
            for call in _calls(params, [importances, anchors], lrs, impl, stage)
        ]
        wide = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        total: Tensor = torch.stack([part.to(parts[0].device, wide) for part in parts]).sum()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ewc_lambda, lrs, variant, impl, stage, n = ctx.constants
        wanted = [i for i in range(n) if ctx.needs_input_grad[_CONSTANTS + i]]
        params, importances, anchors = _lists_of(ctx.saved_tensors, n)
        held = [params[i] for i in wanted], [importances[i] for i in wanted], [anchors[i] for i in wanted]
        alphas = [lrs[i] for i in wanted]
        if torch.is_grad_enabled():  # create_graph=True: operations that autograd can follow
            from fastewc.ops.ewc_penalty import reference

            omegas = [omega.to(w.device) for w, omega in zip(held[0], held[1], strict=True)]
            stars = [star.to(w.device) for w, star in zip(held[0], held[2], strict=True)]
            numbers, live = lrs_of(alphas, grad.device)
            pulls = reference.ewc_penalty_grads(
                held[0], omegas, stars, (), ewc_lambda, numbers, live, variant, False, grad
            )
        else:
            options = {"ewc_lambda": ewc_lambda, "lrs": alphas, "variant": variant, "impl": impl, "stage": stage}
            pulls = ewc_penalty_grads(*held, scale=grad, **options)
        rest = iter(pulls)
        grads = [next(rest) if ctx.needs_input_grad[_CONSTANTS + i] else None for i in range(n)]
        return (*[None] * _CONSTANTS, *grads, *[None] * (len(ctx.saved_tensors) - n))


_CONSTANTS = 6  # arguments of _Penalty.forward before the tensors


def _lists_of(tensors: Sequence[Tensor], n: int) -> tuple[list[Tensor], list[Tensor | Codes], list[Tensor]]:
    """The lists of which :class:`_Penalty` takes the tensors one by one: params, importances, anchors."""
    omegas, scales = tensors[n : 2 * n], tensors[3 * n :]
    importances = [Codes(omega, scales[i]) if omega.dtype == torch.uint8 else omega for i, omega in enumerate(omegas)]
    return list(tensors[:n]), importances, list(tensors[2 * n : 3 * n])


def _kernels(impl: str, device: torch.device) -> ModuleType:
    """The module of the implementation that runs on a device; all have the same four functions."""
    match choose("ewc_penalty", impl, device):
        case "triton":
            from fastewc.ops.ewc_penalty import triton

            return triton
        case "native":
            from fastewc.ops.ewc_penalty import native

            return native
        case "reference":
            from fastewc.ops.ewc_penalty import reference

            return reference


@dataclass(frozen=True)
class _Call:
    """What one call of a kernel is given: parts of tensors on one device."""

    device: torch.device
    kernels: ModuleType
    parts: list[Part]
    held: list[list[Any]]  # params, then the columns
    alphas: tuple[list[float], Tensor | None]

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a list of tensors, which may be empty."""
        return [part.of(tensors[part.row].detach()) for part in self.parts if tensors]


def _calls(
    params: Sequence[Tensor],
    columns: Sequence[Sequence[Tensor | Codes]],
    lrs: Sequence[Lr],
    impl: str,
    stage: Stage | None,
    beside: Sequence[Tensor] = (),
) -> Iterator[_Call]:
    """One call for each device, or for each piece of what a stager brings there; ``beside`` is cut likewise."""
    for device, chosen in _by_device(params):
        kernels, stager = _kernels(impl, device), None if stage is None else stage(device)
        if stager is None:
            parts = [Part(i, 0, params[i].numel(), True) for i in chosen]
            held = [[entries[i].detach() for i in chosen] for entries in (params, *columns)]
            yield _Call(device, kernels, parts, held, lrs_of([lrs[i] for i in chosen], device))
            continue
        rows = [[entries[i] for i in chosen] for entries in (params, *columns, *([beside] if beside else []))]
        cuttable = [can_cut(*row) for row in zip(*rows, strict=True)]
        for piece in stager.pieces(rows[1 : 1 + len(columns)], cuttable):
            own = [part.of(rows[0][part.row].detach()) for part in piece.parts]
            parts = [part._replace(row=chosen[part.row]) for part in piece.parts]
            alphas = lrs_of([lrs[part.row] for part in parts], device)
            yield _Call(device, kernels, parts, [own, *piece.columns], alphas)


def _by_device(params: Sequence[Tensor]) -> list[tuple[torch.device, list[int]]]:
    """The indices of the tensors on each device; most models have one."""
    found: dict[torch.device, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        found[p.device].append(i)
    return list(found.items())


def _check(
    params: Sequence[Tensor],
    importances: Sequence[Tensor | Codes],
    anchors: Sequence[Tensor],
    lrs: Sequence[Lr],
    variant: str,
    stage: Stage | None,
) -> None:
    if variant not in VARIANTS:
        raise ValueError(
            f"variant must be one of {', '.join(VARIANTS)} (the ones that are a loss term), got {variant!r}"
        )
    if not len(params) == len(importances) == len(anchors) == len(lrs):
        raise ValueError(
            f"params, importances, anchors and lrs must be equally long, got {len(params)}, {len(importances)}, "
            f"{len(anchors)} and {len(lrs)}"
        )
    if not params:
        raise ValueError("params is empty: there is nothing to penalise")
    for i, (w, importance, anchor, lr) in enumerate(zip(params, importances, anchors, lrs, strict=True)):
        if not w.shape == importance.shape == anchor.shape:
            raise ValueError(
                f"tensor {i}: params {tuple(w.shape)}, importances {tuple(importance.shape)} and anchors "
                f"{tuple(anchor.shape)} must have one shape"
            )
        if stage is None and not w.device == importance.device == anchor.device:
            raise ValueError(
                f"tensor {i}: params on {w.device}, importances on {importance.device}, anchors on {anchor.device}; "
                "wanted one device"
            )
        if lr is None and variant != "plain":
            raise ValueError(f"variant {variant!r} needs the learning rate: c = λΩ/(1 + αλΩ)")
