"""Synaptic intelligence (Zenke et al. 2017): importances from the path that training took (E7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastewc import _state
from fastewc._names import op_dtype, trainable_parameters
from fastewc._optimizers import learning_rate, parameter_ids, unwrap_optimizer
from fastewc.attach import StepHooks, grad_sign, skipped, with_grad
from fastewc.importance.base import Importance
from fastewc.ops.ewc_penalty import ewc_penalty_grads

if TYPE_CHECKING:
    from fastewc.ewc import EWC


@dataclass
class PathTerm:
    """One parameter's path: ω = −Σ g·(w⁺ − w) and the weights where it started; None before the first tracked step."""

    parameter: Tensor
    omega: Tensor | None
    start: Tensor | None


class PathSource(Protocol):
    """What :func:`si_importance` reads: a fastewc optimizer with ``path_integral=``, or a :class:`PathIntegral`."""

    @property
    def path_integral_steps(self) -> int:
        """How many steps have been tracked since the last reset."""

    def path_integrals(self) -> dict[str, PathTerm]:
        """The path of every named parameter."""

    def reset_path_integral(self) -> None:
        """Forget the path; the next tracked step starts a new one."""


def si_importance(
    source: PathSource | Optimizer, damping: float = 0.1, *, reset: bool = True, clamp: bool = True
) -> Importance:
    """Synaptic-intelligence importance: Ω = max(ω, 0) / ((w − w_start)² + ξ), Zenke et al. 2017, eq. 5 (E7).

    ω = −Σ_steps g·(w⁺ − w), g the gradient of the task loss alone (unscaled, unclipped, before the penalty), w⁺ − w
    what the step really wrote.

    Args:
        source: a fastewc optimizer made with ``path_integral=True``, or a :class:`PathIntegral`.
        damping: ξ > 0.
        reset: start a new path afterwards, at the weights of the next tracked step.
        clamp: False keeps negative ω (for comparison with the papers). :meth:`fastewc.EWC.consolidate` refuses
        negative values.

    Returns:
        Importance of method "si", float32 (float64 for float64 parameters); num_samples counts tracked steps; a
        parameter that never had a gradient is 0 with path "unused".

    Raises:
        TypeError: source keeps no path integral.
        ValueError: damping is not positive, no step was tracked yet, or (with clamp) a value is not finite.
    """
    kept: Any = unwrap_optimizer(source) or source
    if not all(hasattr(kept, name) for name in ("path_integrals", "path_integral_steps", "reset_path_integral")):
        raise TypeError(
            f"{type(source).__name__} keeps no path integral: give a fastewc.optim optimizer made with "
            "path_integral=True, or a fastewc.PathIntegral around any torch optimizer"
        )
    if not damping > 0:
        raise ValueError(f"damping (ξ) must be > 0, got {damping!r}")
    terms, steps = kept.path_integrals(), kept.path_integral_steps
    if steps == 0:
        raise ValueError(
            "no step has been tracked yet: train with this optimizer first, then ask for its SI importance"
        )
    values, paths = {}, {}
    with torch.no_grad():
        for name, term in terms.items():
            values[name] = _damped(term, damping, clamp)
            paths[name] = (
                "fused" if not isinstance(kept, PathIntegral) else "op",
                "path integral of the optimizer's steps",
            )
            if term.omega is None:
                paths[name] = ("unused", "no step had a gradient for it")
    importance = Importance({n: v.clamp(min=0) for n, v in values.items()}, num_samples=steps, method="si")
    if not clamp:
        _state.require_finite(values, "the path integral")
        dict.update(importance, values)  # past the check that values are >= 0, which is what was asked for
    importance.report.update(paths)
    if reset:
        kept.reset_path_integral()
    return importance


def _damped(term: PathTerm, damping: float, clamp: bool) -> Tensor:
    p = term.parameter.detach()
    if term.omega is None or term.start is None:
        return torch.zeros_like(p, dtype=op_dtype(p))
    omega = term.omega.clamp(min=0) if clamp else term.omega
    drift = p.to(omega.dtype) - term.start.to(omega.dtype)
    return omega / (drift * drift + damping)


@dataclass(eq=False)
class _Tracker:
    """The part of :class:`PathIntegral` that acts around the update; it reads gradients before a penalty is added."""

    owner: PathIntegral
    order: int = 0
    _open: list[tuple[str, Tensor, Tensor, Tensor]] = field(default_factory=list)  # name, p, task gradient, old weight

    def check(self, optimizer: Optimizer) -> None:
        self.owner.follow(optimizer)

    def undo(self) -> None:
        self._open = []

    def before(self, optimizer: Optimizer) -> None:
        for group, p in with_grad(optimizer):
            name = self.owner.name_of(p)
            if name is not None:
                self._open.append((name, p, self._task_gradient(optimizer, group, p), p.detach().clone()))

    def _task_gradient(self, optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor:
        """g: p.grad unscaled, with the sign of the loss, without a penalty that is part of the loss."""
        assert p.grad is not None
        g = p.grad.to_dense() if p.grad.layout != torch.strided else p.grad
        g = g.detach().to(op_dtype(p), copy=True) * grad_sign(group)
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            g = g / scale.to(g.device)
        ewc = self.owner.ewc
        held = ewc.held(p) if ewc is not None else None
        if (
            ewc is not None
            and held is not None
            and ewc.variant in ("plain", "stabilized")
            and not ewc.is_applied  # else penalty() refuses to be part of a loss
        ):
            omega, anchor = held
            (g,) = ewc_penalty_grads(
                [p], [omega], [anchor], ewc_lambda=ewc.ewc_lambda, lrs=[learning_rate(group)], variant=ewc.variant,
                grads=[g], negate=True, stage=ewc.stage,
            )  # fmt: skip
        return g

    def after(self, optimizer: Optimizer) -> None:
        stepped = False
        for name, p, g, old in self._open:
            skip = skipped(optimizer, p)
            if skip is not None and bool(skip):
                continue
            self.owner.add(name, g, old, p.detach())
            stepped = True
        self._open = []
        self.owner.path_integral_steps += int(stepped)


class PathIntegral:
    """SI's path integral ω = −Σ g·(w⁺ − w), kept by hooks on any torch optimizer (E7; Zenke et al. 2017).

    g is p.grad as the step finds it, before :meth:`fastewc.EWC.attach` adds its penalty, unscaled under GradScaler; a
    gradient clipped before step() is seen clipped. Costs two copies of the weights during a step; the fused optimizers'
    ``path_integral=True`` costs none.

    Args:
        optimizer: any torch.optim.Optimizer; Accelerate's and Lightning's wrappers are looked through.
        model: where the parameter names come from, if neither ewc nor ``named_parameters()`` gave them.
        ewc: names come from it; and where its penalty is part of the loss (neither attached nor fused), its gradient is
            subtracted from p.grad.

    Raises:
        TypeError: no torch optimizer, or LBFGS, which has no single gradient per step.
        ValueError: nothing names the parameters, or the optimizer has a path integral already.
    """

    def __init__(self, optimizer: Any, *, model: nn.Module | None = None, ewc: EWC | None = None) -> None:
        inner = unwrap_optimizer(optimizer)
        if inner is None or isinstance(inner, torch.optim.LBFGS):
            raise TypeError(
                f"PathIntegral needs a torch.optim.Optimizer with one gradient per step, got {type(optimizer).__name__}"
            )
        self.ewc = ewc
        self._model = model
        self._seen: set[int] = set()
        self.follow(inner)
        self._omega: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self.path_integral_steps = 0
        if any(isinstance(part, _Tracker) for part in StepHooks.on(inner).parts):
            raise ValueError(f"this {type(inner).__name__} has a PathIntegral already: remove() that one first")
        self._hooks, self._tracker = StepHooks.on(inner), _Tracker(self)
        self._hooks.parts.append(self._tracker)

    def follow(self, optimizer: Optimizer) -> None:
        """Name the optimizer's parameters, again when param groups were added."""
        ids = parameter_ids(optimizer)
        if ids != self._seen:
            self._parameters = _named(optimizer, self._model, self.ewc)
            self._name_by_id = {id(p): name for name, p in self._parameters.items()}
            self._seen = ids

    def name_of(self, parameter: Tensor) -> str | None:
        """The name under which a parameter is tracked; None if it is not."""
        return self._name_by_id.get(id(parameter))

    def add(self, name: str, g: Tensor, old: Tensor, new: Tensor) -> None:
        """ω −= g·(w⁺ − w) for one parameter, in float32 (float64 for float64)."""
        if name not in self._omega:
            self._omega[name], self._start[name] = torch.zeros_like(g), old
        self._omega[name] -= g * (new.to(g.dtype) - old.to(g.dtype))

    def path_integrals(self) -> dict[str, PathTerm]:
        """ω and w_start of every named parameter."""
        return {n: PathTerm(p, self._omega.get(n), self._start.get(n)) for n, p in self._parameters.items()}

    def reset_path_integral(self) -> None:
        """Forget the path; w_start is taken anew at the next step."""
        self._omega, self._start, self.path_integral_steps = {}, {}, 0

    def remove(self) -> None:
        """Stop tracking; what was tracked can still be read. A second call does nothing."""
        if self._tracker in self._hooks.parts:
            self._hooks.parts.remove(self._tracker)
            self._hooks.drop_if_idle()

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts and tensors: "path_integral" (ω) and "path_integral_start" by name, "path_integral_steps"."""
        return {
            "path_integral": dict(self._omega),
            "path_integral_start": dict(self._start),
            "path_integral_steps": self.path_integral_steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a :meth:`state_dict` stopped; ω keeps float32 whatever the model's dtype.

        Raises:
            ValueError: unknown names, other shapes, or missing keys. Nothing has changed then.
        """
        _state.require_keys(state_dict, ("path_integral_steps",))
        omega, start = (_state.tensors_of(state_dict, key) for key in ("path_integral", "path_integral_start"))
        steps = int(state_dict["path_integral_steps"])
        if steps < 0:
            raise ValueError(f"path_integral_steps must be >= 0, got {steps}")
        _state.require_finite(omega, "the saved path integral")
        _state.require_finite(start, "the saved start")
        odd = sorted(omega.keys() ^ start.keys()) + [n for n in omega if n not in self._parameters]
        odd += [
            n
            for n in omega
            if n in self._parameters and not omega[n].shape == start[n].shape == self._parameters[n].shape
        ]
        if odd:
            raise ValueError(f"the saved path integral does not fit these parameters: {_state.names(odd)}")
        p = self._parameters
        self._omega = {n: t.to(p[n].device, op_dtype(p[n]), copy=True) for n, t in omega.items()}
        self._start = {n: t.to(p[n].device, copy=True) for n, t in start.items()}
        self.path_integral_steps = steps


def _named(optimizer: Optimizer, model: nn.Module | None, ewc: EWC | None) -> dict[str, Tensor]:
    """Names for the optimizer's parameters: from ewc, else its own (named_parameters()), else from model."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if ewc is not None:
        found = {name: p for p in held if (name := ewc.name_of(p)) is not None}
    elif all("param_names" in group for group in optimizer.param_groups):
        given = [name for group in optimizer.param_groups for name in group["param_names"]]
        found = dict(zip(given, held, strict=True))
    elif model is not None:
        ids = {id(p) for p in held}
        found = {name: p for name, p in trainable_parameters(model).items() if id(p) in ids}
    else:
        raise ValueError(
            "parameter names are needed: give ewc=, build the optimizer from model.named_parameters(), or give model="
        )
    if not found:
        raise ValueError("the optimizer holds none of the named parameters: was it built from another model?")
    return found
