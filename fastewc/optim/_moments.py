"""What Adam and AdamW share: the state of torch.optim.Adam."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastewc.ops.ewc_step import StepTensors, moment_dtype
from fastewc.optim._base import ProtectedOptimizer


class AdamStep(ProtectedOptimizer):
    """Gathers step, exp_avg, exp_avg_sq and max_exp_avg_sq, made as torch.optim.Adam makes them."""

    kind = "adam"
    rule_options = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")

    def lacks_state(self, group: dict[str, Any], p: Tensor) -> bool:
        """The counter comes with the moments; amsgrad may be switched on later."""
        state = self.state.get(p, {})
        missing = "step" not in state or (group["amsgrad"] and "max_exp_avg_sq" not in state)
        return missing or super().lacks_state(group, p)

    def _collect_state(self, group: dict[str, Any], p: Tensor, tensors: StepTensors) -> None:
        state, kept = self.state[p], moment_dtype(p.dtype, self.state_dtype)
        zeros = partial(torch.zeros_like, p, dtype=kept, memory_format=torch.preserve_format)
        # Kernels on a GPU advance the counter themselves, so that the step waits for nothing.
        by_kernel = p.device.type != "cpu" and self.choose(group, p.device) != "reference"
        on_device = group["capturable"] or group["fused"] or by_kernel
        if "step" in state and by_kernel and state["step"].device != p.device:  # from a checkpoint of torch.optim
            state["step"] = state["step"].to(p.device)
        if "step" not in state:
            # torch keeps the counter in float64 where that is the default dtype, except for its fused
            # kernels.
            wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
            dtype = torch.float64 if wide else torch.float32
            state["step"] = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
            state["exp_avg"] = zeros()
            state["exp_avg_sq"] = zeros()
        if group["amsgrad"]:
            if "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = zeros()
            tensors.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
        tensors.steps.append(state["step"])
        tensors.exp_avgs.append(state["exp_avg"])
        tensors.exp_avg_sqs.append(state["exp_avg_sq"])
