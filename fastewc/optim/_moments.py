"""What Adam and AdamW share: the state of torch.optim.Adam, and one rule for the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastewc.ops.ewc_step import StepRule, StepTensors
from fastewc.optim._base import ProtectedOptimizer


class AdamStep(ProtectedOptimizer):
    """Gathers step, exp_avg, exp_avg_sq and max_exp_avg_sq, made as torch.optim.Adam makes them."""

    def _rule(self, group: dict[str, Any]) -> StepRule:
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
        return StepRule("adam", **{name: group[name] for name in names}, **self._penalty_rule())

    def _collect_state(self, group: dict[str, Any], p: Tensor, tensors: StepTensors) -> None:
        state = self.state[p]
        if "step" not in state:
            on_device = group["capturable"] or group["fused"]
            # torch keeps the counter in float64 where that is the default dtype, except for its fused
            # kernels.
            wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
            dtype = torch.float64 if wide else torch.float32
            state["step"] = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if group["amsgrad"]:
            if "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            tensors.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
        tensors.steps.append(state["step"])
        tensors.exp_avgs.append(state["exp_avg"])
        tensors.exp_avg_sqs.append(state["exp_avg_sq"])
