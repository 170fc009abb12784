"""What a step needs of a param group: gathered once, and kept while every tensor in it is still the same object.

Gathering costs some microseconds per parameter, as much as a small network's whole step. So the lists stay from step
to step; only the gradients are taken anew. Whatever else may have changed is compared by identity at each step, so
nothing has to announce a change: a state dict was loaded, a tensor of the state replaced, a parameter frozen, the
model moved, a task consolidated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastewc._offload import Stager
from fastewc.ops.ewc_step import Implementation, StepRule, StepTensors, implementation
from fastewc.optim._pieces import step_pieces

if TYPE_CHECKING:
    from fastewc.optim._base import ProtectedOptimizer

# List of StepTensors -> key in the optimizer's state.
_STATE_KEYS = {
    "momentum_buffers": "momentum_buffer",
    "exp_avgs": "exp_avg",
    "exp_avg_sqs": "exp_avg_sq",
    "max_exp_avg_sqs": "max_exp_avg_sq",
    "steps": "step",
    "path_integrals": "path_integral",
    "remainders": "param_remainder",
}
# Options of a group that decide which lists there are, and what runs.
_OPTIONS = ("amsgrad", "momentum", "fused", "capturable")


@dataclass(frozen=True)
class Call:
    """The tensors of one group on one device, their places in the group, and what steps them."""

    tensors: StepTensors
    places: list[int]
    step: Implementation
    stager: Stager | None  # where Ω and w* are on the host

    def pieces(self, *, whole: bool = False) -> Iterable[StepTensors]:
        """What to step: all at once, or piece by piece as Ω and w* come; ``whole``: without cutting any tensor."""
        if self.stager is None or not any(omega is not None for omega in self.tensors.importances):
            return (self.tensors,)
        return step_pieces(self.stager, self.tensors, whole=whole)


class GroupPlan:
    """The calls of one param group.

    Args:
        optimizer: whose group it is; its state is made where it is missing.
        group: the param group.
        grads: the gradient of each of its parameters, or None.
    """

    def __init__(self, optimizer: ProtectedOptimizer, group: dict[str, Any], grads: Sequence[Tensor | None]) -> None:
        self._params = list(group["params"])
        self._layouts = _layouts(grads)
        self._kinds = _kinds(self._params)
        self._options = _options(optimizer, group)
        by_device: dict[tuple[torch.device, int], tuple[StepTensors, list[int]]] = {}
        seen = Counter[int]()
        for i, (p, grad) in enumerate(zip(self._params, grads, strict=True)):
            if grad is not None:
                # torch allows a parameter twice in a group, and steps it twice: in calls of their own, one by one.
                tensors, places = by_device.setdefault((p.device, seen[id(p)]), (StepTensors(), []))
                seen[id(p)] += 1
                tensors.params.append(p)
                places.append(i)
                optimizer.collect(group, p, tensors)
        self.calls = [
            Call(
                tensors,
                places,
                implementation(optimizer.choose(group, device), device),
                None if optimizer.ewc is None else optimizer.ewc.stager(device),
            )
            for (device, _), (tensors, places) in by_device.items()
        ]
        if optimizer.ewc is not None:
            for device in {device for device, _ in by_device}:
                optimizer.ewc.live_lambda(device)  # made before any capture
        self._states = [optimizer.state.get(p) for p in self._params]  # None: without state
        self._kept = [
            (optimizer.state.get(p, {}), key, tensor)
            for tensors, _ in by_device.values()
            for name, key in _STATE_KEYS.items()
            for p, tensor in zip(tensors.params, getattr(tensors, name), strict=False)  # empty lists are not used
        ]
        self._held = None if optimizer.ewc is None else optimizer.ewc.held_by_name()
        self._rule: StepRule | None = None
        self._rule_values: list[Any] = []

    def holds(self, optimizer: ProtectedOptimizer, group: dict[str, Any], grads: Sequence[Tensor | None]) -> bool:
        """True while a new plan would have the same lists."""
        params = group["params"]
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and self._layouts == _layouts(grads)
            and self._options == _options(optimizer, group)
            and (optimizer.ewc is None or all(map(is_, self._held or (), optimizer.ewc.held_by_name())))
            and self._kinds == _kinds(params)
            and all(map(is_, self._states, map(optimizer.state.get, params)))
            and all(state.get(key) is tensor for state, key, tensor in self._kept)
        )

    def take(self, grads: Sequence[Tensor | None]) -> None:
        """Put the present gradients into the calls."""
        for call in self.calls:
            call.tensors.grads[:] = [grad for i in call.places if (grad := grads[i]) is not None]

    def rule(self, optimizer: ProtectedOptimizer, group: dict[str, Any], *, captured: bool) -> StepRule:
        """How to step now: the same object while every number is the same object."""
        penalty = optimizer.penalty_options(group, captured=captured)
        values = [*map(group.get, optimizer.rule_options), *group.get("betas", ()), optimizer.clip_penalty]
        values += penalty.values()
        if self._rule is None or not all(map(is_, values, self._rule_values)):
            self._rule, self._rule_values = optimizer.rule(group, penalty), values
        return self._rule


def _layouts(grads: Sequence[Tensor | None]) -> list[torch.layout | None]:
    return [None if grad is None else grad.layout for grad in grads]


def _kinds(params: Sequence[Tensor]) -> list[tuple[int, torch.dtype]]:
    """Device and dtype, which model.to(…) changes under a parameter."""
    return [(p.get_device(), p.dtype) for p in params]


def _options(optimizer: ProtectedOptimizer, group: dict[str, Any]) -> tuple[Any, ...]:
    own = (optimizer.impl, optimizer.path_integral, optimizer.master_weights, optimizer.state_dtype)
    return (*map(group.get, _OPTIONS), *own)
