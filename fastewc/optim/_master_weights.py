"""bfloat16 parameters that are trained as float32 weights, and moments wider than their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastewc._names import op_dtype
from fastewc.ops.ewc_step import moment_dtype, whole

REMAINDER = "param_remainder"
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
PATH_TENSORS = ("path_integral", "path_integral_start")


class MasterWeightState(Optimizer):
    """The low halves of bfloat16 parameters, and the dtypes of what an optimizer keeps of a parameter."""

    master_weights: bool = False
    state_dtype: torch.dtype | None = None

    def _take_dtypes(self, master_weights: bool, state_dtype: torch.dtype | None) -> None:
        if state_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"state_dtype must be torch.float32, the dtype of the 16-bit parameters, or None; got {state_dtype!r}"
            )
        self.master_weights = bool(master_weights)
        self.state_dtype = torch.float32 if self.master_weights and state_dtype is None else state_dtype

    def _check_dtype(self, p: Tensor) -> None:
        """ValueError for a parameter that the options do not fit."""
        if self.master_weights and p.dtype == torch.float16:
            raise ValueError(
                "master_weights=True keeps the 16 bits that bfloat16 drops of a float32 weight; it was given a float16 "
                "parameter. Convert the model with model.bfloat16(), or leave master_weights out."
            )
        if p.dtype.itemsize == 2 and self.state_dtype not in (None, torch.float32, p.dtype):
            raise ValueError(
                f"state_dtype={self.state_dtype} with a {p.dtype} parameter: wanted torch.float32, {p.dtype} or None"
            )

    def _remainder_of(self, p: Tensor) -> Tensor | None:
        """The low half of one parameter, made at its first step; None where the parameter is the whole weight."""
        state = self.state[p]
        if p.dtype != torch.bfloat16:
            state.pop(REMAINDER, None)  # model.float() has made a weight of the high half
            return None
        if REMAINDER not in state:
            state[REMAINDER] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
        remainder: Tensor = state[REMAINDER]
        return remainder

    def _weight(self, p: Tensor) -> Tensor:
        """The whole weight: the parameter itself, or a float32 tensor of both halves."""
        low = self.state.get(p, {}).get(REMAINDER) if self.master_weights and p.dtype == torch.bfloat16 else None
        return p if low is None else whole(p, low)

    def lacks_state(self, group: dict[str, Any], p: Tensor) -> bool:
        """Whether the next step would make state for a parameter."""
        return self.master_weights and p.dtype == torch.bfloat16 and REMAINDER not in self.state.get(p, {})

    def _check_remainders(self, state_dict: dict[str, Any]) -> None:
        """ValueError for a saved low half that this optimizer would lose."""
        for p, state in self._saved_states(state_dict):
            low = state.get(REMAINDER)
            if low is None:
                continue
            undo = f'To start from the rounded weights, delete "{REMAINDER}" from the states.'
            if low.dtype != torch.int16:
                raise ValueError(
                    f"the saved {REMAINDER} is {low.dtype}, wanted torch.int16: another optimizer's load_state_dict "
                    f"has cast it, as torch.optim's does. {undo}"
                )
            if not self.master_weights or p.dtype != torch.bfloat16:
                has = f"a {p.dtype} parameter" if self.master_weights else "master_weights=False"
                raise ValueError(
                    f"this optimizer state was saved with master_weights=True, of bfloat16 parameters, but this "
                    f"optimizer has {has}: it would lose the lower halves of the weights. {undo}"
                )

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Give loaded state its own dtypes back: torch has cast every tensor to the dtype of its parameter."""
        for p, state in self._saved_states(state_dict):
            own = dict.fromkeys(MOMENTS, moment_dtype(p.dtype, self.state_dtype))
            own |= dict.fromkeys(PATH_TENSORS, op_dtype(p)) | {REMAINDER: torch.int16}
            for key, dtype in own.items():
                if state.get(key) is not None:
                    self.state[p][key] = state[key].to(p.device, dtype)

    def _saved_states(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """(parameter, its saved state), in the order of the groups."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        return ((p, state_dict["state"].get(i, {})) for i, p in zip(ids, params, strict=False))
