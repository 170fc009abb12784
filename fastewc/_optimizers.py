"""What we ask of a torch optimizer, and which optimizers apply an EWC by themselves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor
from torch.optim import Optimizer


def unwrap_optimizer(optimizer: Any) -> Optimizer | None:
    """The torch optimizer inside Accelerate's and Lightning's wrappers; None if there is none."""
    while type(optimizer).__module__.split(".")[0] in (
        "accelerate",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
    ):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    return optimizer if isinstance(optimizer, Optimizer) else None


def learning_rate(group: dict[str, Any]) -> float | Tensor:
    """α of a param group: a number or a 0-dim tensor (torch accepts any tensor of one element)."""
    lr: float | Tensor = group["lr"]
    return lr.detach().reshape(()) if isinstance(lr, Tensor) else lr


def learning_rates(optimizer: Optimizer) -> dict[int, float | Tensor]:
    """α by id of the parameter: its group's live learning rate."""
    return {id(p): learning_rate(group) for group in optimizer.param_groups for p in group["params"]}


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """The ids of all parameters that an optimizer steps."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@dataclass
class _Owner:
    optimizer: ReferenceType[Optimizer]
    how: str  # "fused" or "attached"
    superseded: bool = False


class Owners:
    """The optimizers that apply one EWC, so that its penalty is never applied twice, nor dropped unnoticed.

    They are held weakly: an optimizer that is thrown away no longer counts.
    """

    def __init__(self) -> None:
        self._owners: list[_Owner] = []

    def live(self) -> list[tuple[Optimizer, str]]:
        """(optimizer, how) of those that still exist and were not superseded."""
        pairs = [(o.optimizer(), o.how) for o in self._owners if not o.superseded]
        return [(optimizer, how) for optimizer, how in pairs if optimizer is not None]

    def how(self, optimizer: Optimizer) -> str | None:
        """How a listed optimizer applies it, "fused" or "attached", superseded or not; None if it is not listed."""
        return next((o.how for o in self._owners if o.optimizer() is optimizer), None)

    def add(self, optimizer: Optimizer, how: str, protected: Collection[int]) -> None:
        """List an optimizer; any other over one of the same protected parameters is superseded."""
        known = parameter_ids(optimizer) & set(protected)
        for owner in self._owners:
            other = owner.optimizer()
            if other is not None and other is not optimizer and known & parameter_ids(other):
                owner.superseded = True
        self.remove(optimizer)
        self._owners.append(_Owner(ref(optimizer), how))

    def remove(self, optimizer: Optimizer) -> None:
        """Take an optimizer off the list, and all that no longer exist."""
        self._owners = [o for o in self._owners if o.optimizer() not in (None, optimizer)]

    def supersede_strangers(self, model: Collection[int]) -> None:
        """Supersede optimizers that hold none of the model's parameters (ids): they step a former model."""
        for owner in self._owners:
            optimizer = owner.optimizer()
            if optimizer is not None and not parameter_ids(optimizer) & set(model):
                owner.superseded = True

    def check(self, optimizer: Optimizer) -> None:
        """RuntimeError if this optimizer was superseded."""
        if any(o.superseded and o.optimizer() is optimizer for o in self._owners):
            raise RuntimeError(
                f"this {type(optimizer).__name__} no longer applies its ewc: a newer optimizer over the same "
                "parameters took over, or ewc was rebound to another model. Step the newer one, or build a new "
                "optimizer."
            )
