"""AdamW with the penalty inside the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastewc.optim._base import EXTRA_ARGUMENTS
from fastewc.optim._moments import AdamStep

if TYPE_CHECKING:
    from fastewc._dispatch import Impl
    from fastewc.ewc import EWC
    from fastewc.optim._path_integral import PathIntegralMode


class AdamW(AdamStep, torch.optim.AdamW):
    """torch.optim.AdamW whose step also applies, clips and tracks what continual learning needs.

    Arguments, defaults, state and ``state_dict`` are those of :class:`torch.optim.AdamW`; without ``ewc`` so
    are the results. The pull c(w − w*) of E1 or E2, taken from w before the decay, joins the gradient before
    the moments, so Adam rescales it like any gradient and αc ≤ 1 bounds nothing by itself; E3 and E4 act on
    w′ after the update, the decay included.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
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
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._take_extras(ewc, max_grad_norm, path_integral, clip_penalty, impl, master_weights, state_dtype)
        self._join(self.param_groups)


AdamW.__doc__ = f"{AdamW.__doc__}{EXTRA_ARGUMENTS}"
