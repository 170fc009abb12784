"""The op behind every fast implementation of ewc_step: its schema, and what a call of it is made of.

The public call takes lists with gaps (an unprotected parameter has no Ω) and scalars that may be numbers or tensors.
The op takes neither: :func:`launches` splits the tensors into sets in which every list is full or empty, and
:func:`scalars_of` turns the rule's scalars into one list of numbers or one device tensor. So a kernel is compiled for
"with Ω" or "without", never asks per tensor, and never waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastewc.ops.ewc_step.rule import StepRule, StepTensors, moment_dtype

#: The order of ``scalars`` (and of ``live_scalars``, a float64 tensor of the same eight on the parameters' device).
SCALARS = ("lr", "ewc_lambda", "weight_decay", "beta1", "beta2", "eps", "momentum", "dampening")

#: ``scales`` are those of importances that are codes (``importance_codes.split``): none, or one for each importance.
SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, "
    "Tensor[] importances, Tensor[] scales, Tensor[] anchors, Tensor(g!)[] path_integrals, "
    "Tensor(h!)[] remainders, "
    "Tensor? clip_coef, Tensor? grad_scale, Tensor? found_inf, Tensor? live_scalars, float[] scalars, "
    "str kind, str variant, bool maximize, bool nesterov, bool first, bool amsgrad, bool decoupled_weight_decay, "
    "bool clip_penalty, bool regularized_path) -> ()"
)


@dataclass(frozen=True)
class Launch:
    """Tensors whose lists are each full or empty. ``first``: the momentum buffers are new and not to be read."""

    tensors: StepTensors
    first: bool


_LISTS = tuple(field.name for field in fields(StepTensors))


def launches(rule: StepRule, tensors: StepTensors) -> list[Launch]:
    """Split by which of Ω, ω, the remainder and the momentum buffer an entry has; one launch where all have the same.

    Missing momentum buffers are allocated here and put into ``tensors``, in the layout of their parameter.
    """
    gaps = (tensors.momentum_buffers, tensors.importances, tensors.path_integrals, tensors.remainders)
    if not any(entry is None for entries in gaps for entry in entries):
        return [Launch(tensors, False)]
    fresh = [buffer is None for buffer in tensors.momentum_buffers]
    for i, new in enumerate(fresh):
        if new:
            dtype = moment_dtype(tensors.params[i].dtype, rule.state_dtype)
            tensors.momentum_buffers[i] = torch.zeros_like(tensors.params[i], dtype=dtype, requires_grad=False)
    patterns = list(
        zip(
            fresh or [False] * len(tensors.params),
            [entry is not None for entry in tensors.importances] or [False] * len(tensors.params),
            [entry is not None for entry in tensors.path_integrals] or [False] * len(tensors.params),
            [entry is not None for entry in tensors.remainders] or [False] * len(tensors.params),
            strict=True,
        )
    )
    found = dict.fromkeys(patterns)
    return [Launch(_subset(tensors, patterns, pattern, len(found) == 1), pattern[0]) for pattern in found]


def _subset(
    tensors: StepTensors, patterns: Sequence[tuple[bool, ...]], pattern: tuple[bool, ...], whole: bool
) -> StepTensors:
    _, held, tracked, split = pattern
    absent = ([] if held else ["importances", "anchors"]) + ([] if tracked else ["path_integrals"])
    absent += [] if split else ["remainders"]
    lists = {}
    for name in _LISTS:
        entries = [] if name in absent else getattr(tensors, name)
        if entries and not whole:
            entries = [entry for entry, own in zip(entries, patterns, strict=True) if own == pattern]
        lists[name] = entries
    return StepTensors(**lists)


def scalars_of(rule: StepRule, device: torch.device) -> tuple[list[float], Tensor | None]:
    """(numbers, None), or ([], float64 tensor [8] on ``device``) if any of them is a tensor; the order of SCALARS."""
    if rule.numbers is not None:
        return rule.numbers, None
    live = [
        value.detach().reshape(()).to(device, torch.float64)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=torch.float64, device=device)
        for value in rule.scalars
    ]
    return [], torch.stack(live)
