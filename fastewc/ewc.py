"""EWC, the object a user holds: importances Ω and anchors w* by parameter name, and the ways to apply them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastewc import _state, _storage, files
from fastewc._binding import Binding
from fastewc._fold import Fold
from fastewc._graphs import LiveNumber, capturing
from fastewc._names import Exclude, as_patterns, model_parameters, op_dtype, require_matches
from fastewc._offload import CudaStreams, Stage, Stager, refuse_capture
from fastewc._optimizers import Owners
from fastewc._state import Changes, Importances, Options
from fastewc._storage import Held
from fastewc.attach import AttachHandle, attach
from fastewc.importance.base import Importance
from fastewc.ops.ewc_penalty import ewc_penalty, ewc_stats
from fastewc.ops.importance_codes import Codes, numbers

LearningRate = float | Tensor | Optimizer | None
_TENSORS = ("importance", "importance_scales", "anchor")  # of a state dict, each by name


class EWC:
    """Elastic weight consolidation: holds weights near their old values in proportion to how important they were.

    Keeps, for every trainable parameter that is not excluded, an importance Ω ≥ 0 and an anchor w*, folded over all
    tasks so far, so that K tasks cost what one costs. Four penalties, λ = ``ewc_lambda``, α the live learning rate:

    * ``"plain"`` (E1, Kirkpatrick et al. 2017, eq. 3): loss term (λ/2) Σ Ω(w − w*)², gradient λΩ(w − w*). Diverges with
      plain SGD where αλΩ > 2.
    * ``"stabilized"`` (E2, Kutalev & Lapina 2021, arXiv 2109.10021): gradient c(w − w*) with c = λΩ/(1 + αλΩ). With
      plain SGD one step's pull never exceeds w − w*. It moves the optimum (a stiff weight is held at most with 1/α);
      under momentum it is bounded but underdamped, and Nesterov with task curvature can diverge.
    * ``"proximal"`` (E3): after the optimizer's own step to w′, w⁺ = (w′ + αλΩw*)/(1 + αλΩ). Never moves w′ away
      from w*.
    * ``"wva"`` (E4, weight velocity attenuation, Kutalev 2020, whose λ is our αλ): w⁺ = w + (w′ − w)/(1 + αλΩ). A brake
      without a pull: it delays forgetting, its optimum is the unprotected one.

    λ is therefore not comparable across penalties. Tasks are folded in by :meth:`consolidate`; Ω̄ ← γΩ̄ + Ω_K and

    * ``anchor="latest"`` (E11): w* = w_K;
    * ``anchor="weighted"`` (E10): w* ← w* + (Ω_K/Ω̄)(w_K − w*), the exact minimum of Σ_k γ^(K−k) Ω_k(w − w_k)².

    BatchNorm's running statistics are buffers: no penalty protects them (a warning says so once). Freeze or re-estimate
    them per task where that matters.

    Args:
        model: any torch.nn.Module; DDP, torch.compile and checkpoint wrappers are looked through.
        ewc_lambda: λ ≥ 0, finite; may be changed at any time.
        variant: "plain", "stabilized", "proximal" or "wva".
        gamma: γ in [0, 1]: 1 sums importances, below 1 is online EWC, 0 keeps the last task only.
        anchor: "latest" or "weighted".
        importance_dtype: storage of Ω: torch.float32 (float64 for float64 parameters), torch.bfloat16, or torch.uint8:
            one byte a weight, within 3 % over six decades below the maximum of its block of 1,024 (the format is in
            fastewc/ops/importance_codes.py). The first task is rounded to nearest; later sums are rounded
            stochastically from fixed seeds, within 6 % and unbiased, since to nearest small addends would be lost.
        anchor_dtype: storage of w*: None for the parameter's dtype, torch.float32, torch.float64 or torch.bfloat16,
            which is exact for weights that come from a bfloat16 checkpoint; else consolidate warns of the rounding.
        offload: True keeps Ω and w* of parameters on a GPU in page-locked host memory. Steps, penalty() and stats()
            stream them through two buffers of 32 MiB on the device, the next piece while one is worked on. Weights and
            gradients are those of offload=False to the bit, the values of penalty() and stats() to rounding (sums of
            the pieces' sums). Not in a CUDA graph. Without effect on a CPU. Like importance_dtype it is part of the
            state that files and state dicts restore. The order of copies and kernels is tested on a CPU alone:
            offloading has not run on a GPU yet.
        exclude: fnmatch patterns of parameter names that stay free; one string is one pattern.

    Raises:
        TypeError: model is no module, or an argument has the wrong type.
        ValueError: λ, γ out of range, an unknown option, or no parameter to protect.
        NotImplementedError: anchor="weighted" with float16 anchors, or DTensor parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ewc_lambda: float,
        variant: str = "stabilized",
        gamma: float = 1.0,
        anchor: str = "latest",
        importance_dtype: torch.dtype = torch.float32,
        anchor_dtype: torch.dtype | None = None,
        offload: bool = False,
        exclude: Exclude = (),
    ) -> None:
        self._options = Options(
            ewc_lambda=_state.checked_lambda(ewc_lambda),
            variant=variant,
            gamma=gamma,
            anchor=anchor,
            importance_dtype=importance_dtype,
            anchor_dtype=anchor_dtype,
            offload=offload,
            exclude=as_patterns(exclude),
        )
        self._binding = Binding(model, self._options.exclude)
        self._importance: dict[str, Tensor | Codes] = {}  # empty until the first consolidate, as is _anchor
        self._anchor: dict[str, Tensor] = {}
        self._facts = Importances()
        self._owners = Owners()
        self._live_lambda = LiveNumber()
        self._stagers: dict[torch.device, Stager] = {}
        self._half_written = False  # True for good where consolidate() was stopped while it wrote
        self._options.check_anchor_storage(self._binding.parameters)
        _warn_of_running_statistics(model)

    @property
    def model(self) -> nn.Module:
        """The module whose parameters are protected."""
        return self._binding.model

    @property
    def ewc_lambda(self) -> float:
        """λ ≥ 0; takes effect at the next step or penalty()."""
        return self._options.ewc_lambda

    @ewc_lambda.setter
    def ewc_lambda(self, value: float) -> None:
        self._options.ewc_lambda = _state.checked_lambda(value)
        self._live_lambda.set(self._options.ewc_lambda)

    def live_lambda(self, device: torch.device) -> Tensor:
        """λ as a float64 tensor that follows :attr:`ewc_lambda`: what a captured CUDA graph reads. For the steps."""
        return self._live_lambda.on(device, self.ewc_lambda)

    @property
    def variant(self) -> str:
        """The penalty: "plain", "stabilized", "proximal" or "wva"."""
        return self._options.variant

    @property
    def gamma(self) -> float:
        """γ: how much of the former tasks' importance a new task keeps."""
        return self._options.gamma

    @property
    def anchor(self) -> str:
        """Where the anchor is: "latest" or "weighted"."""
        return self._options.anchor

    @property
    def exclude(self) -> tuple[str, ...]:
        """The fnmatch patterns of parameters that stay free."""
        return self._options.exclude

    @property
    def num_tasks(self) -> int:
        """How many tasks have been consolidated."""
        return self._facts.num_tasks

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a protected parameter; None if ewc does not know it."""
        return self._binding.name_by_id.get(id(parameter))

    def held(self, parameter: Tensor) -> Held | None:
        """(Ω, w*) of one parameter, of its shape; None where nothing holds it (yet).

        On its device, or on the host with ``offload``: :meth:`stager` brings them.
        """
        self._require_whole()
        name = self._binding.name_by_id.get(id(parameter)) if self.num_tasks else None
        if name is None:
            return None
        kept = self._importance[name], self._anchor[name]
        fitting = self._options.follow(kept, parameter)
        if fitting[0] is not kept[0] or fitting[1] is not kept[1]:  # after model.to(…)
            self._importance = {**self._importance, name: fitting[0]}
            self._anchor = {**self._anchor, name: fitting[1]}
        return fitting

    def held_by_name(self) -> tuple[dict[str, Tensor | Codes], dict[str, Tensor], dict[int, str]]:
        """What :meth:`held` looks up: Ω and w* by name, names by id. None of the three is ever changed in place."""
        return self._importance, self._anchor, self._binding.name_by_id

    def stager(self, device: torch.device) -> Stager | None:
        """What brings Ω and w* to a device; None where they are there. For the steps."""
        if not self._options.offload or device.type == "cpu":
            return None
        if device not in self._stagers:
            self._stagers[device] = Stager(device, CudaStreams(device))
        return self._stagers[device]

    @property
    def stage(self) -> Stage | None:
        """:meth:`stager` for the ops of the penalty; None without ``offload``."""
        return self.stager if self._options.offload else None

    def consolidate(self, importance: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """End a task: fold its importance in, Ω̄ ← γΩ̄ + Ω_K, and re-take the anchor (E10, E11).

        Args:
            importance: parameter name → Ω_K, of the parameter's shape, any float dtype and device, finite and ≥ 0: a
                fastewc.Importance or any mapping. Names that ``exclude`` matches are ignored.
            strict: True wants exactly the protected names; False lets a missing name add 0.

        Raises:
            ValueError: names or shapes that are not ewc's; a value that is NaN, infinite, negative, or beyond what
                importance_dtype holds (the parameter is named); an importance from zero samples; an ``exclude`` pattern
                that matches nothing (first call).
            TypeError: no mapping of tensors.
            NotImplementedError: DTensor values.
            After any of these nothing has changed: all is checked before anything is written. Later tasks are then
            written into the tensors that are held, since a second set would double the memory: stopped in the middle
            (Ctrl-C, no memory for a few MB), the object refuses every use until a state is loaded. A UserWarning says
            how much 16-bit anchors were rounded, where they were.
        """
        if not isinstance(importance, Mapping):
            raise TypeError(f"importance must map parameter names to tensors, got {type(importance).__name__}")
        if getattr(importance, "num_samples", None) == 0:
            raise ValueError(
                "the importance comes from zero samples: it says nothing about any weight. Compute it on data first."
            )
        first = self.num_tasks == 0
        if first:
            require_matches(model_parameters(self.model), self.exclude)
        self._binding.refresh(self._importance)
        parameters = self._binding.parameters
        self._options.check_anchor_storage(parameters)
        _state.require_finite(parameters, "the weight")
        fresh = _state.checked_importance(
            importance, parameters, self.exclude, model_parameters(self.model), strict=strict
        )
        with torch.no_grad():
            folds = [
                Fold(name, parameters[name], value, None if first else self.held(parameters[name]), self._options)
                for name, value in fresh.items()
            ]
            for fold in folds:
                fold.check()
            rounding = _storage.AnchorRounding()
            for stager in self._stagers.values():
                stager.wait()  # what earlier steps copy is overwritten now
            self._half_written = not first
            written = {fold.name: fold.write(self.num_tasks, rounding) for fold in folds}
            if first:
                self._importance = {name: omega for name, (omega, _) in written.items()}
                self._anchor = {name: star for name, (_, star) in written.items()}
            self._half_written = False
        self._facts.add(importance)
        if rounding.largest > 0:
            warnings.warn(
                f"anchors were rounded to {self._options.anchor_dtype or 'the dtype of their parameters'}, by: "
                f"{rounding}. Weights from a bfloat16 checkpoint have no such error; for others "
                "anchor_dtype=torch.float32 avoids it.",
                UserWarning,
                stacklevel=2,
            )

    def rebind(
        self, model: nn.Module | None = None, *, rename: Mapping[str, str] | None = None, strict: bool = True
    ) -> Changes:
        """Follow a model that was wrapped, sharded, replaced, renamed or grown.

        Args:
            model: the model to protect from now on; None for the same object.
            rename: {old name: new name}; every old name must be held, no two may meet.
            strict: True wants the same names and shapes. False lets new names and grown dimensions join with Ω = 0 and
                w* = the current weight, and drops names that vanished (or no longer require a gradient).

        Returns:
            The lists of names: ``added``, ``grown``, ``dropped``. A warning names them as well.

        Raises:
            ValueError: names or shapes differ (strict), a parameter shrank or changed its number of dimensions, or a
                bad ``rename``. Nothing has changed then.
        """
        binding = Binding(self.model if model is None else model, self.exclude)
        self._options.check_anchor_storage(binding.parameters)
        changes = Changes()
        for p in self._binding.parameters.values():
            self.held(p)  # follow model.to() first, as the steps do
        if self.num_tasks:
            importance, anchor, changes = _state.fit(
                self._importance, self._anchor, binding.parameters, self._options, rename=rename, strict=strict
            )
            self._importance, self._anchor = importance, anchor
        self._binding = binding
        changes.warn()
        self._owners.supersede_strangers([id(p) for p in model_parameters(self.model).values()])
        return changes

    def penalty(self, lr: LearningRate = None) -> Tensor:
        """½ Σ c(w − w*)², a loss term: c = λΩ (E1, "plain") or λΩ/(1 + αλΩ) (E2, "stabilized").

        Add it to the loss, once per optimizer step. Where gradients are clipped or accumulated the penalty's own
        gradient is too; the fused optimizers and :meth:`attach` avoid that.

        Args:
            lr: α: a float, a 0-dim tensor, or the optimizer (each parameter its group's lr). None for "plain" only.

        Returns:
            0-dim tensor, float32 (float64 if any parameter is), with one backward; a differentiable 0 before the first
            task.

        Raises:
            ValueError: "proximal" and "wva" are no loss terms; lr is missing; the optimizer lacks a protected
                parameter; the model is no longer the one that was consolidated (see :meth:`rebind`).
            RuntimeError: an optimizer applies this ewc already and gradients are on: the penalty would count twice.
                Under torch.no_grad() the value may be read for logging.
        """
        if self.variant not in ("plain", "stabilized"):
            raise ValueError(
                f"variant {self.variant!r} acts after the optimizer's step and is no loss term: use fastewc.optim or "
                "ewc.attach"
            )
        if torch.is_grad_enabled() and self.is_applied:
            gc.collect()  # an optimizer in a reference cycle outlives its last use
        if torch.is_grad_enabled() and self.is_applied:
            how = ", ".join(f"{type(optimizer).__name__} ({how})" for optimizer, how in self._owners.live())
            raise RuntimeError(
                f"this ewc is already applied by {how}: adding penalty() to the loss would count it twice. Drop one "
                "of the two; for logging call penalty() under torch.no_grad()."
            )
        alpha = self._binding.alpha(lr, needed=self.variant != "plain")
        if self.num_tasks == 0:
            dtypes = {op_dtype(p) for p in self._binding.parameters.values()}
            device = next(iter(self._binding.parameters.values())).device
            dtype = torch.float64 if torch.float64 in dtypes else torch.float32
            return torch.zeros((), dtype=dtype, device=device, requires_grad=torch.is_grad_enabled())
        params, importances, anchors = self._tensors()
        ewc_lambda, lrs = self.ewc_lambda, [alpha(n) for n in self._binding.parameters]
        live = self.live_lambda(params[0].device)  # made before any capture
        if capturing():
            # λΩ/(1 + αλΩ) = λ · Ω/(1 + (αλ)Ω), so that λ is read at every replay
            ewc_lambda, lrs = 1.0, [None if lr is None else lr * live for lr in lrs]
        value = ewc_penalty(
            params, importances, anchors, ewc_lambda=ewc_lambda, lrs=lrs, variant=self.variant, stage=self.stage
        )
        return value * live.to(value) if capturing() else value

    def stats(self, lr: LearningRate) -> dict[str, float]:
        """How strongly the weights are held now: one pass over them, one transfer to the host.

        Args:
            lr: α, as in :meth:`penalty`; needed for every variant, since αλΩ is what decides stability.

        Returns:
            "penalty": ½Σc(w − w*)², c of E2 for "stabilized", of E1 for the others;
            "max", "q50", "q90", "q99", "share_above_1" of αλΩ over all protected weights (quantiles to 1 %, from a
            logarithmic histogram); "rms_drift": √mean(w − w*)². All 0 before the first task.

        Raises:
            ValueError: lr is missing, or the optimizer lacks a protected parameter.
        """
        alpha = self._binding.alpha(lr, needed=True)
        if self.num_tasks == 0:
            return dict.fromkeys(("penalty", "max", "q50", "q90", "q99", "share_above_1", "rms_drift"), 0.0)
        params, importances, anchors = self._tensors()
        variant = "stabilized" if self.variant == "stabilized" else "plain"
        lrs = [alpha(n) for n in self._binding.parameters]
        return ewc_stats(
            params,
            importances,
            anchors,
            ewc_lambda=self.ewc_lambda,
            lrs=[a for a in lrs if a is not None],
            variant=variant,
            stage=self.stage,
        )

    def _tensors(self) -> tuple[list[Tensor], list[Tensor | Codes], list[Tensor]]:
        self._binding.refresh(self._importance)
        pairs = [(p, self.held(p)) for p in self._binding.parameters.values()]
        held = [(p, *pair) for p, pair in pairs if pair is not None]
        assert len(held) == len(self._binding.parameters)
        return [h[0] for h in held], [h[1] for h in held], [h[2] for h in held]

    def attach(self, optimizer: Optimizer) -> AttachHandle:
        """Apply the penalty inside any torch optimizer's step(), by hooks; see :func:`fastewc.attach.attach`."""
        return attach(self, optimizer)

    def adopt(self, optimizer: Optimizer, how: str = "fused") -> None:
        """Let an optimizer apply the penalty from now on. Called by fastewc.optim and :meth:`attach`, not by users.

        Re-resolves the names; any other optimizer over one of the same parameters is superseded: its next step raises.

        Raises:
            ValueError: the model has changed, or the optimizer holds none of its parameters.
        """
        self._binding.refresh(self._importance)
        self._binding.check_optimizer(optimizer)
        self._owners.add(optimizer, how, self._binding.name_by_id)

    @property
    def is_applied(self) -> bool:
        """True while an optimizer applies the penalty by itself, fused or attached."""
        return bool(self._owners.live())

    def release(self, optimizer: Optimizer) -> None:
        """The optimizer no longer applies the penalty."""
        self._owners.remove(optimizer)

    def applied_by(self, optimizer: Optimizer) -> str | None:
        """How this optimizer applies the penalty by itself, "fused" or "attached"; None if it does not."""
        return self._owners.how(optimizer)

    def _require_whole(self) -> None:
        if self._half_written:
            raise RuntimeError(
                "consolidate() was stopped while it wrote the new importances and anchors (by Ctrl-C, or for want of "
                "memory), so some are of the new task and some are not: load_state_dict() a saved state, or EWC.load() "
                "a file"
            )

    def check_owner(self, optimizer: Optimizer) -> None:
        """Raise RuntimeError if another optimizer has taken over, or the model was rebound away from this one."""
        self._require_whole()
        if self._options.offload:
            refuse_capture()
        self._owners.check(optimizer)

    def importances(self) -> Importance:
        """Ω̄ by name: a copy, float32 (float64 for float64 parameters); zeros of no samples before the first task."""
        held = _state.importances_of(self.state_dict())
        dtypes = {n: op_dtype(p) for n, p in self._binding.parameters.items()}
        return Importance(
            {n: numbers(omega, dtypes[n]).clone() for n, omega in held.items()},
            num_samples=self._facts.num_samples,
            method=self._facts.method,
        )

    def anchors(self) -> dict[str, Tensor]:
        """w* by name: a copy; the current weights before the first task."""
        return {name: t.clone() for name, t in self.state_dict()["anchor"].items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain dicts and tensors: "importance" and "anchor" by name, and the options.

        With importance_dtype=torch.uint8 "importance" holds codes and "importance_scales" their scales, one for 1,024
        codes in the order of their memory; else the latter is empty.

        The same keys before the first task (zeros, and the current weights). Tensors are ewc's own, not copies:
        :meth:`consolidate` writes into them. ``copy.deepcopy`` keeps a state in memory.
        """
        if self.num_tasks:
            for p in self._binding.parameters.values():
                self.held(p)  # follow the model's device and dtype
            held, anchor = self._importance, dict(self._anchor)
        else:
            self._binding.refresh(self._importance)
            held, anchor, _ = _state.fit({}, {}, self._binding.parameters, self._options, rename=None, strict=False)
        return {
            "importance": {n: omega.codes if isinstance(omega, Codes) else omega for n, omega in held.items()},
            "importance_scales": {n: omega.scales for n, omega in held.items() if isinstance(omega, Codes)},
            "anchor": anchor,
            **self._facts.as_dict(),
            **self._options.as_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict` of a model with the same names and shapes; restores λ, variant and γ too.

        Raises:
            ValueError: keys, names, shapes, dtypes or values that do not fit. Nothing has changed then.
        """
        self._load(state_dict, self.model, rename=None, strict=True)

    def save(self, path: files.PathLike) -> None:
        """Write Ω̄, w* and the options to one safetensors file, atomically.

        Raises:
            OSError: the file cannot be written; an older file of that name is unchanged.
        """
        state = self.state_dict()
        for name, omega in _state.importances_of(state).items():
            if isinstance(omega, Codes):  # a file has one order of elements: scales must be those of that order
                plain = omega.relaid(torch.empty(omega.shape, dtype=torch.uint8, device=omega.device))
                state["importance"][name], state["importance_scales"][name] = plain.codes, plain.scales
        tensors = {f"{kind}/{name}": t for kind in _TENSORS for name, t in state[kind].items()}
        header = {key: value for key, value in state.items() if key not in _TENSORS}
        files.save_tensors(path, tensors, header, "ewc")

    @classmethod
    def load(
        cls,
        path: files.PathLike,
        model: nn.Module,
        *,
        strict: bool = True,
        rename: Mapping[str, str] | None = None,
        ewc_lambda: float | None = None,
    ) -> EWC:
        """Read a file of :meth:`save` for a model, with the λ, variant, γ, anchor and exclude that it was saved with.

        Args:
            path: the file; one written on a GPU loads on a CPU.
            model: the model to protect; its parameters need not hold the anchor's values.
            strict: names, shapes and dtypes must be the model's; False behaves as :meth:`rebind` does and warns of what
                was added, grown or dropped.
            rename: {name in the file: name in the model}.
            ewc_lambda: λ, if not the file's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, damaged or foreign file, one of a newer format, or of another model.
        """
        tensors, header = files.load_tensors(path, "ewc")
        state: dict[str, Any] = {**header, **{kind: {} for kind in _TENSORS}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind not in _TENSORS:
                raise ValueError(f"{path}: unexpected entry {key!r} (damaged file)")
            state[kind][name] = tensor
        ewc = cls(model, ewc_lambda=0.0, exclude=Options.from_dict(state).exclude)
        ewc._load(state, model, rename=rename, strict=strict)
        if ewc_lambda is not None:
            ewc.ewc_lambda = ewc_lambda
        return ewc

    def _load(
        self, state: Mapping[str, Any], model: nn.Module, *, rename: Mapping[str, str] | None, strict: bool
    ) -> None:
        options, facts = Options.from_dict(state), Importances.from_dict(state)
        binding = Binding(model, options.exclude)
        options.check_anchor_storage(binding.parameters)
        importance, anchor, changes = _state.fit(
            _state.importances_of(state),
            _state.tensors_of(state, "anchor"),
            binding.parameters,
            options,
            rename=rename,
            strict=strict,
        )
        plain = {name: omega for name, omega in importance.items() if isinstance(omega, Tensor)}
        _state.check_finite(plain, "the loaded importance")
        _state.require_finite(anchor, "the loaded anchor")
        self._options, self._facts, self._binding = options, facts, binding
        self._importance, self._anchor = (importance, anchor) if facts.num_tasks else ({}, {})
        self._half_written = False
        self._live_lambda.set(options.ewc_lambda)
        changes.warn()

    def __repr__(self) -> str:
        o = self._options
        return (
            f"EWC(ewc_lambda={o.ewc_lambda:g}, variant={o.variant!r}, gamma={o.gamma:g}, anchor={o.anchor!r}, "
            f"num_tasks={self.num_tasks}, parameters={len(self._binding.parameters)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Optimizers adopt themselves again; streams are of this process.
        return {k: v for k, v in self.__dict__.items() if k not in ("_owners", "_stagers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._owners, self._stagers = Owners(), {}


def _warn_of_running_statistics(model: nn.Module) -> None:
    count = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in model.modules())
    if count:
        warnings.warn(
            f"the model has {count} BatchNorm layers: their running statistics are buffers, which no penalty "
            "protects. Freeze them (keep those layers in eval mode) or re-estimate them per task where that matters.",
            UserWarning,
            stacklevel=3,
        )
