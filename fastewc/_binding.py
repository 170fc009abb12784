"""The protected parameters by name, bound to the Parameter objects that the model has now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastewc import _state
from fastewc._names import matches, model_parameters, refuse_dtensor, refuse_fsdp1, trainable_parameters
from fastewc._optimizers import learning_rates, parameter_ids, unwrap_optimizer
from fastewc.ops.importance_codes import Codes


def protectable(model: nn.Module, exclude: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """What an EWC covers: every parameter that requires a gradient and is not excluded.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: there is none.
        NotImplementedError: DTensor parameters, FullyShardedDataParallel.
    """
    named = {name: p for name, p in trainable_parameters(model).items() if not matches(name, exclude)}
    if not named:
        raise ValueError("the model has no parameter to protect: none requires a gradient, or exclude names them all")
    refuse_dtensor(named, "EWC")
    refuse_fsdp1(model, "EWC")
    return named


class Binding:
    """Names → parameters of one model, and what an optimizer knows of them.

    Wrapping, sharding and growing replace Parameter objects, so a name is what lasts: :meth:`refresh` looks the objects
    up again.
    """

    def __init__(self, model: nn.Module, exclude: tuple[str, ...]) -> None:
        self.model = model
        self.exclude = exclude
        self._warned: set[str] = set()
        self.bind(protectable(model, exclude))

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take these over."""
        self.parameters = dict(parameters)
        self.name_by_id = {id(p): name for name, p in parameters.items()}

    def refresh(self, held: Mapping[str, Tensor | Codes]) -> None:
        """Look the parameters up again: those in ``held`` (name → Ω̄), or all protectable ones while nothing is held.

        Raises:
            ValueError: a held name is gone or has another shape.
        """
        if not held:
            self.bind(protectable(self.model, self.exclude))
            return
        present = model_parameters(self.model)
        gone = [name for name in held if name not in present]
        changed = [name for name in held if name in present and present[name].shape != held[name].shape]
        if gone or changed:
            raise ValueError(
                "the model is no longer the one that was consolidated: "
                + _state.listing(("missing", gone), ("of another shape", changed))
                + ". Call ewc.rebind(strict=False) to take the change over, or ewc.rebind(rename={old: new})."
            )
        self.bind({name: present[name] for name in held})

    def alpha(self, lr: Any, *, needed: bool) -> Callable[[str], Any]:
        """α by parameter name, from what a caller gave as ``lr``: a number, a tensor, an optimizer, or None.

        Raises:
            ValueError: None where it is needed, or an optimizer that does not hold every protected parameter.
            TypeError: something else.
        """
        if lr is None:
            if needed:
                raise ValueError(
                    "lr is needed: c = λΩ/(1 + αλΩ). Give the learning rate (float or tensor) or the optimizer."
                )
            return lambda name: None
        optimizer = unwrap_optimizer(lr)
        if optimizer is None:
            value = _state.checked_lr(lr)
            return lambda name: value
        by_id = learning_rates(optimizer)
        missing = [name for name, p in self.parameters.items() if id(p) not in by_id]
        if missing:
            raise ValueError(
                "the optimizer does not hold these protected parameters, so their learning rate is unknown: "
                f"{_state.names(missing)}. Give lr as a number, or exclude them."
            )
        return lambda name: by_id[id(self.parameters[name])]

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise ValueError for an optimizer of another model; warn, once each, of what it steps unprotected."""
        names = {id(p): name for name, p in model_parameters(self.model).items()}
        if not parameter_ids(optimizer) & names.keys():
            raise ValueError(
                "the optimizer holds no parameter of this ewc's model: was it built from another model, or before "
                "the model was replaced or sharded? Build it from ewc.model's parameters, or call ewc.rebind(model)."
            )
        unknown = []
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                place = f"param_groups[{g}]['params'][{i}] {tuple(p.shape)}, not in the model"
                name = names.get(id(p), place)
                known = id(p) in self.name_by_id or not p.requires_grad or matches(name, self.exclude)
                if not known and name not in self._warned:
                    unknown.append(name)
        if unknown:
            self._warned.update(unknown)
            warnings.warn(
                f"the optimizer steps {len(unknown)} parameters that ewc does not know: they are unprotected: "
                f"{_state.names(unknown)}. ewc.rebind(strict=False) lets new ones join at their present value.",
                UserWarning,
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "name_by_id"}  # ids do not survive a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.bind(self.parameters)
