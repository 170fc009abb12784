"""SGD with the penalty inside the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastewc.ops.ewc_step import StepTensors
from fastewc.optim._base import EXTRA_ARGUMENTS, ProtectedOptimizer

if TYPE_CHECKING:
    from fastewc._dispatch import Impl
    from fastewc.ewc import EWC
    from fastewc.optim._path_integral import PathIntegralMode


class SGD(ProtectedOptimizer, torch.optim.SGD):
    """torch.optim.SGD whose step also applies, clips and tracks what continual learning needs.

    Arguments, defaults, state and ``state_dict`` are those of :class:`torch.optim.SGD`; without ``ewc`` so
    are the results. With s = αλΩ, the pull c(w − w*) of E1 or E2 joins the gradient before weight decay and
    momentum; E3 and E4 act on w′ after the update. Stability limits of the plain penalty in s: 2; 2(1 + μ)
    with momentum μ; 2(1 + μ)/(1 + 2μ) with Nesterov.
    """

    kind = "sgd"
    rule_options = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        ewc: EWC | None = None,
        max_grad_norm: float | None = None,
        path_integral: PathIntegralMode = False,
        clip_penalty: bool = False,
        impl: Impl = "auto",
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._take_extras(ewc, max_grad_norm, path_integral, clip_penalty, impl, master_weights, state_dtype)
        self._join(self.param_groups)

    def _collect_state(self, group: dict[str, Any], p: Tensor, tensors: StepTensors) -> None:
        if group["momentum"] != 0:
            tensors.momentum_buffers.append(self.state[p].get("momentum_buffer"))

    def lacks_state(self, group: dict[str, Any], p: Tensor) -> bool:
        """Momentum starts with the first gradient."""
        missing = group["momentum"] != 0 and self.state.get(p, {}).get("momentum_buffer") is None
        return missing or super().lacks_state(group, p)

    def _keep_state(self, group: dict[str, Any], tensors: StepTensors) -> None:
        for p, buffer in zip(tensors.params, tensors.momentum_buffers, strict=False):  # no buffers without momentum
            if buffer is not None:
                self.state[p]["momentum_buffer"] = buffer


SGD.__doc__ = f"{SGD.__doc__}{EXTRA_ARGUMENTS}"
