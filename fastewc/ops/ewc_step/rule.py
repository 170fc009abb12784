"""What an ewc_step call is given: how to step, and the lists of tensors to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastewc.ops.importance_codes import Codes

Variant = Literal["plain", "stabilized", "proximal", "wva"]


def moment_dtype(param: torch.dtype, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the moments of a parameter: the one asked for if the parameter has 16 bits, else its own."""
    return state_dtype if state_dtype is not None and param.itemsize == 2 else param


@dataclass(frozen=True)
class StepRule:
    """How to step: what all tensors of one call have in common. Names and meanings are those of torch.optim.

    ``lr`` is α, in the penalties too. ``betas``, ``eps``, ``amsgrad``, ``decoupled_weight_decay`` belong to
    Adam, and ``momentum``, ``dampening``, ``nesterov`` to SGD. Tensors among them have one element and may
    live on any device.

    Attributes:
        variant: "plain" (E1), "stabilized" (E2), "proximal" (E3) or "wva" (E4); see :func:`ewc_step`.
        ewc_lambda: λ ≥ 0.
        clip_penalty: the clip coefficient scales the sum of task gradient and penalty, not the task gradient
            alone.
        regularized_path: the path integral uses task gradient + penalty, not the task gradient alone.
        state_dtype: of new momentum buffers, see :func:`moment_dtype`.
        scalars: everything of ``schema.SCALARS``, in its order.
        numbers: the scalars as numbers; None if any of them is a tensor, whose value may change.
    """

    kind: Literal["sgd", "adam"]
    lr: float | Tensor
    weight_decay: float | Tensor = 0.0
    maximize: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    decoupled_weight_decay: bool = False
    variant: Variant = "stabilized"
    ewc_lambda: float | Tensor = 0.0
    clip_penalty: bool = False
    regularized_path: bool = False
    state_dtype: torch.dtype | None = None

    scalars: tuple[float | Tensor, ...] = field(init=False, repr=False, compare=False)
    numbers: list[float] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        scalars = (
            self.lr, self.ewc_lambda, self.weight_decay, *self.betas, self.eps, self.momentum, self.dampening,
        )  # fmt: skip
        live = any(isinstance(value, Tensor) for value in scalars)
        object.__setattr__(self, "scalars", scalars)
        object.__setattr__(self, "numbers", None if live else [float(value) for value in scalars])


@dataclass(frozen=True)
class StepTensors:
    """What to step: parallel lists, entry i of each belongs to ``params[i]`` and has its shape; one device.

    A list that the rule does not use stays empty. Moments have the parameter's dtype or a wider one, path integrals
    float32 (float64 for float64 parameters), steps are 0-dim floats, on the CPU or on the device of the parameter.

    Attributes:
        momentum_buffers: None before the first step with momentum; :func:`ewc_step` puts the new buffer in
            its place.
        importances: Ω, or None where the parameter is unprotected: float32 (float64 for float64 parameters), bfloat16,
            or codes of one byte.
        anchors: w*, None where Ω is.
        path_integrals: ω of synaptic intelligence, or None where it is not tracked.
        remainders: int16, what bfloat16 parameters lack of their float32 weights (``halves.py``); None where the
            parameter is the whole weight.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    momentum_buffers: list[Tensor | None] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    importances: list[Tensor | Codes | None] = field(default_factory=list)
    anchors: list[Tensor | None] = field(default_factory=list)
    path_integrals: list[Tensor | None] = field(default_factory=list)
    remainders: list[Tensor | None] = field(default_factory=list)
