"""What the protected optimizers share: gather lists, call one op, keep the extra state honest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastewc import _dispatch
from fastewc._graphs import capturing
from fastewc._names import is_dtensor
from fastewc.ops.ewc_step import StepRule, StepTensors, clip_coefficient, gradient_norm
from fastewc.optim._capture import refuse_new_state, refuse_uncapturable
from fastewc.optim._path_integral import PathIntegralMode, PathIntegralState
from fastewc.optim._plan import Call, GroupPlan

if TYPE_CHECKING:
    from fastewc.ewc import EWC

_EXTRAS = (
    "ewc", "max_grad_norm", "path_integral", "clip_penalty", "impl", "grad_norm", "master_weights", "state_dtype",
)  # fmt: skip

EXTRA_ARGUMENTS = """
All arithmetic is float32 (float64 for float64 parameters) whatever the storage, each result rounded once.
A bfloat16 parameter keeps 8 bits of that, so w − αu rounds back to w wherever αu is below half an ulp, |w|/512
to |w|/256: at the learning rates of fine-tuning most of the training is lost. ``master_weights=True`` keeps it.

Gradients are only read: unscaling (``torch.amp.GradScaler`` hands its scale to ``step()``) and clipping leave
``p.grad`` as it is. A step in which the scaler found an overflow changes nothing at all. ``fused=False``
selects the reference implementation; ``foreach`` is accepted and has no effect; ``differentiable=True``,
sparse and complex gradients raise.

In a CUDA graph (Adam and AdamW: ``capturable=True``) every replay reads λ, and a learning rate that is a tensor
on the GPU, as they are then. At least one step must run before the capture. A graph keeps the tensors of Ω and w*
that it was captured with: capture again after the first ``ewc.consolidate``, after loading a state and after
``ewc.rebind``; later tasks are written into the same tensors. With ``EWC(offload=True)`` a capture raises.

Args:
    ewc: a :class:`fastewc.EWC` over the same parameters: α is the live learning rate of each group, λ is read
        at every step. Until its first ``consolidate`` steps are the plain ones. Parameters it does not know
        are unprotected.
    max_grad_norm: clip the *task* gradient to this global L2 norm over all groups, before the penalty is
        added, by min(1, max_grad_norm/(norm + 1e-6)). The norm before clipping is left in ``opt.grad_norm``,
        a 0-dim tensor.
    path_integral: True keeps ω ← ω − g(w⁺ − w) of synaptic intelligence (Zenke et al. 2017, eq. 3; here E7)
        for :func:`fastewc.si_importance`, g the unscaled, unclipped task gradient, w⁺ what was really
        written. "regularized" takes g with the penalty's gradient in it, as the papers' published code does.
        Needs names: ``ewc``, or ``named_parameters()`` for ``params``.
    clip_penalty: clip task gradient + penalty together (``opt.grad_norm`` is then the norm of the sum): the
        order of the papers' code, for comparison. A few large Ω then eat the whole norm.
    impl: "auto", "reference", "triton" or "native". An explicit one never falls back.
    master_weights: train bfloat16 parameters as float32 weights: ``state[p]["param_remainder"]``, int16 of the
        parameter's shape, keeps the 16 bits that bfloat16 drops. Both are together exactly the weight that
        decay, penalties, update and path integral see (``fastewc/ops/ewc_step/halves.py``); the parameter is
        that weight rounded to nearest, ties away from zero. 2 bytes a weight, where a float32 copy takes 4,
        and nothing random: a step has the bits of the float32 step on the same gradients. It starts at 0: the
        parameter is the weight. Written from outside (``model.load_state_dict``), a parameter moves by at most
        half an ulp, by the remainder that stayed; load the optimizer's state with it. ``ewc.consolidate``
        takes w* from the parameter, so right after it a pull of up to half an ulp is left. Parameters of 32
        and 64 bits are stepped as ever; float16 ones are refused.
    state_dtype: of the moments (exp_avg, exp_avg_sq, max_exp_avg_sq, momentum_buffer) of 16-bit parameters:
        torch.float32 or their own dtype. None is float32 with ``master_weights``, else their own, as torch has
        it. A bfloat16 exp_avg_sq stalls: at β₂ = 0.999 a step changes it by about v/1000, and half its ulp is
        v/512 to v/256: it never decays, and rises only on gradients of about twice its root or more. Moments of
        wider parameters keep their parameter's dtype.

Raises:
    TypeError: ``ewc`` is no EWC.
    ValueError: an argument out of range; ``path_integral`` without names; ``fused=False`` with a fast
        ``impl``; an ``ewc`` that knows none of the parameters; ``master_weights`` with a float16 parameter; a
        ``state_dtype`` that is neither float32 nor the dtype of the 16-bit parameters.
    NotImplementedError: ``differentiable=True``; an ``impl`` that cannot run here; DTensor parameters
        together with ``ewc``, ``max_grad_norm``, ``path_integral``, ``master_weights`` or ``state_dtype``.
"""


class ProtectedOptimizer(PathIntegralState):
    """Mixed in before a torch optimizer: its step() becomes one call of ``ewc_step`` per group and device.

    Attributes:
        ewc: the EWC that the step applies, or None.
        grad_norm: the gradient norm of the latest step with ``max_grad_norm``, 0-dim; None before it.
    """

    # GradScaler then leaves grad_scale and found_inf here, and the gradients scaled.
    _step_supports_amp_scaling = True

    # Class attributes, since torch's constructor calls add_param_group before the extras are known.
    kind: Literal["sgd", "adam"]
    rule_options: tuple[str, ...]  # of a param group, that are fields of StepRule
    max_grad_norm: float | None = None
    clip_penalty: bool = False
    impl: _dispatch.Impl = "auto"
    grad_norm: Tensor | None = None

    def _take_extras(
        self,
        ewc: EWC | None,
        max_grad_norm: float | None,
        path_integral: PathIntegralMode,
        clip_penalty: bool,
        impl: _dispatch.Impl,
        master_weights: bool,
        state_dtype: torch.dtype | None,
    ) -> None:
        """Validate and keep the arguments that torch's optimizers lack."""
        from fastewc.ewc import EWC

        if self.defaults["differentiable"]:
            raise NotImplementedError(
                "differentiable=True: autograd through the protected step is not implemented; use the torch.optim "
                "optimizer with ewc.penalty() in the loss"
            )
        if ewc is not None and not isinstance(ewc, EWC):
            raise TypeError(f"ewc must be a fastewc.EWC, got {type(ewc).__name__}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no clipping; got {max_grad_norm}")
        if path_integral not in (False, True, "regularized"):
            raise ValueError(f'path_integral must be False, True or "regularized", got {path_integral!r}')
        self._take_dtypes(master_weights, state_dtype)
        self.ewc, self.max_grad_norm, self.path_integral = ewc, max_grad_norm, path_integral
        self.clip_penalty, self.impl, self.grad_norm = bool(clip_penalty), impl, None

    def _join(self, groups: list[dict[str, Any]]) -> None:
        """Check new groups, then let ewc resolve their parameters: last, since older optimizers lose them."""
        for group in groups:
            self._check_group(group)
        if self.ewc is not None:
            self.ewc.adopt(self)

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["fused"] is False and self.impl not in ("auto", "reference"):
            raise ValueError(f"fused=False selects the reference implementation, but impl={self.impl!r}; drop one")
        for p in group["params"]:
            self.choose(group, p.device)
            self._check_dtype(p)
            wanted = {
                "ewc": self.ewc,
                "max_grad_norm": self.max_grad_norm,
                "path_integral": self.path_integral or None,
                "master_weights": self.master_weights or None,
                "state_dtype": self.state_dtype,
            }
            asked = [name for name, value in wanted.items() if value is not None]
            if asked and is_dtensor(p):
                raise NotImplementedError(
                    f"{type(self).__name__}: {', '.join(asked)} with DTensor parameters (FSDP2 or tensor parallel) is "
                    "not implemented yet. Use DistributedDataParallel or an unsharded model."
                )
        if self.path_integral and self.ewc is None and "param_names" not in group:
            raise ValueError(
                "path_integral keeps importances by parameter name: give ewc=, or model.named_parameters() in place "
                "of model.parameters()"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; with ``ewc`` names are resolved again, and a warning tells what it does not know."""
        super().add_param_group(param_group)
        joined = False
        try:
            self._check_group(self.param_groups[-1])
            if self.ewc is not None:
                self.ewc.adopt(self)
            joined = True
        finally:
            if not joined:  # whatever was raised, a warning turned into an error included
                self.param_groups.pop()

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps ``step`` in, which runs hooks and labels the step, but only where somebody looks.

        Its ``record_function`` costs as much time as the step of a small network, profiler or not.
        """
        watched = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: ProtectedOptimizer, *args: Any, **kwargs: Any) -> Any:
            hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            everywhere = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
            if hooks or everywhere or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
                return watched(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled, before anything
                else.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: a newer optimizer took the ewc over; graph capture without ``capturable=True``, of a
                first step or with ``path_integral``; meta parameters with ``fused=True``.
            NotImplementedError: a sparse or complex gradient. Nothing has changed then.
        """
        if self.ewc is not None:
            self.ewc.check_owner(self)
        captured = capturing()
        if captured:
            refuse_uncapturable(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and self._reads_found_inf() and bool(found_inf):
            self._check_gradients()
            return loss
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        calls = self._calls(captured)
        clip_coef = None
        if self.max_grad_norm is not None:
            pairs = (
                (rule, tensors)
                for _, rule, call in calls
                for tensors in (call.pieces(whole=True) if self.clip_penalty else (call.tensors,))
            )
            self.grad_norm = gradient_norm(pairs, grad_scale=grad_scale)
            clip_coef = clip_coefficient(self.grad_norm, self.max_grad_norm)
        for group, rule, call in calls:
            for tensors in call.pieces():
                call.step(rule, tensors, clip_coef=clip_coef, grad_scale=grad_scale, found_inf=found_inf)
            self._keep_state(group, call.tensors)
        if self.path_integral:
            self._count_path_step([p for _, _, call in calls for p in call.tensors.params])
        return loss

    def _collect_state(self, group: dict[str, Any], p: Tensor, tensors: StepTensors) -> None:
        raise NotImplementedError

    def _keep_state(self, group: dict[str, Any], tensors: StepTensors) -> None:
        """Take back state that the op made."""

    def penalty_options(self, group: dict[str, Any], *, captured: bool) -> dict[str, Any]:
        """Variant and λ for a group's rule: λ as a tensor where a CUDA graph must read it at every replay."""
        if self.ewc is None:
            return {}
        ewc_lambda: float | Tensor = self.ewc.ewc_lambda
        if (captured or group.get("capturable", False)) and group["params"]:
            ewc_lambda = self.ewc.live_lambda(group["params"][0].device)
        return {"variant": self.ewc.variant, "ewc_lambda": ewc_lambda}

    def rule(self, group: dict[str, Any], penalty: dict[str, Any]) -> StepRule:
        """How to step a group now, with its :meth:`penalty_options`."""
        options = {name: group[name] for name in self.rule_options} | penalty
        regularized = self.path_integral == "regularized"
        return StepRule(
            self.kind, **options, clip_penalty=self.clip_penalty, regularized_path=regularized,
            state_dtype=self.state_dtype,
        )  # fmt: skip

    def _calls(self, captured: bool) -> list[tuple[dict[str, Any], StepRule, Call]]:
        """Per group and device: the rule and the tensors of everything that has a gradient."""
        grads = [[p.grad for p in group["params"]] for group in self.param_groups]
        plans: list[GroupPlan] = self.__dict__.setdefault("_plans", [])
        paired = zip(plans, self.param_groups, grads, strict=False)
        if len(plans) != len(grads) or not all(plan.holds(self, group, own) for plan, group, own in paired):
            self._check_gradients()
            if captured:
                refuse_new_state(self)
            plans[:] = map(GroupPlan, repeat(self), self.param_groups, grads)
        found = []
        for plan, group, own in zip(plans, self.param_groups, grads, strict=True):
            plan.take(own)
            rule = plan.rule(self, group, captured=captured)
            found += [(group, rule, call) for call in plan.calls]
        return found

    def collect(self, group: dict[str, Any], p: Tensor, tensors: StepTensors) -> None:
        """Append what belongs to one parameter, its state made where it is missing. For GroupPlan."""
        self._collect_state(group, p, tensors)
        if self.master_weights:
            tensors.remainders.append(self._remainder_of(p))
        if self.ewc is not None:
            importance, anchor = self.ewc.held(p) or (None, None)
            tensors.importances.append(importance)
            tensors.anchors.append(anchor)
        if self.path_integral:
            tensors.path_integrals.append(self._path_of(p))

    def _check_gradients(self) -> None:
        """Refuse what cannot be stepped, before anything has changed."""
        name = type(self).__name__
        pairs = ((group, p) for group in self.param_groups for p in group["params"] if p.grad is not None)
        for group, p in pairs:
            self._check_dtype(p)
            if p.grad.layout != torch.strided:
                raise NotImplementedError(
                    f"{name} does not support sparse gradients (layout {p.grad.layout}); use dense ones, e.g. "
                    "nn.Embedding(sparse=False)"
                )
            if not p.is_floating_point():
                raise NotImplementedError(
                    f"{name} steps real floating-point parameters, got {p.dtype}; hold a complex one as two real "
                    "parameters (torch.view_as_real)"
                )
            if p.is_meta and group["fused"]:
                raise RuntimeError(
                    "`fused=True` requires all the params to be floating point Tensors of supported devices, this "
                    "one is on meta; call model.to_empty(device=…) and initialise it first"
                )

    def choose(self, group: dict[str, Any], device: torch.device) -> _dispatch.Impl:
        """The implementation that steps a group's tensors on a device."""
        impl = "reference" if group["fused"] is False else self.impl
        chosen: _dispatch.Impl = _dispatch.choose("ewc_step", impl, device)
        return chosen

    def _reads_found_inf(self) -> bool:
        """Whether the host reads found_inf: free on a CPU; the reference and a path integral wait for it."""
        if self.path_integral:
            return True
        pairs = ((group, p.device) for group in self.param_groups for p in group["params"])
        return any(d.type == "cpu" or self.choose(group, d) == "reference" for group, d in pairs)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of torch; with ``ewc`` each param group also carries its ``num_tasks``."""
        state_dict = super().state_dict()
        if self.ewc is not None:
            for group in state_dict["param_groups"]:
                group["num_tasks"] = self.ewc.num_tasks
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but refuses a state whose tasks are not those of ``ewc``, and dtypes are this optimizer's own.

        Path integrals stay float32, remainders int16, moments get ``state_dtype``. A checkpoint of torch.optim, which
        has no ``num_tasks`` and no remainders, loads; its parameters are then the weights.

        Raises:
            ValueError: the saved ``num_tasks`` is not that of ``ewc`` (0 without one), so an importance would
                be forgotten silently; a remainder would be lost, or was cast by another optimizer; or the groups
                differ, as in torch. Nothing has changed then.
        """
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            self._check_tasks(state_dict)
            self._check_fused(state_dict)
            self._check_remainders(state_dict)
            loaded.update(state_dict)

        # The last hook: it sees what the user's hooks made of the state.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._restore_dtypes(loaded)

    def _check_tasks(self, state_dict: dict[str, Any]) -> None:
        if any(group.get("differentiable") for group in state_dict["param_groups"]):
            raise NotImplementedError("the saved optimizer had differentiable=True, which is not implemented here")
        saved = {int(group["num_tasks"]) for group in state_dict["param_groups"] if "num_tasks" in group}
        here = 0 if self.ewc is None else self.ewc.num_tasks
        if not saved or saved == {here}:
            return
        told = ", ".join(str(k) for k in sorted(saved))
        has = "has no ewc" if self.ewc is None else f"has an ewc with {here} consolidated tasks"
        raise ValueError(
            f"this optimizer state was saved with {told} consolidated tasks, but this optimizer {has}. Make it with "
            "ewc= the EWC that was saved beside this state, loaded first (EWC.load or "
            'ewc.load_state_dict); to go on without those tasks, delete "num_tasks" from the param_groups of '
            "the state."
        )

    def _check_fused(self, state_dict: dict[str, Any]) -> None:
        if self.impl not in ("auto", "reference") and any(g.get("fused") is False for g in state_dict["param_groups"]):
            raise ValueError(
                f"the saved optimizer had fused=False, which selects the reference implementation, but this one has "
                f'impl={self.impl!r}. Make it without impl, or set "fused" to None in the param_groups of the state.'
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _EXTRAS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.setdefault("fused", None)  # SGD says False of a checkpoint older than the option: slow, for ever
        super().__setstate__(state)
        for group in self.param_groups:
            group.pop("num_tasks", None)
        if state.get("ewc") is not None:  # copied or unpickled; load_state_dict passes only state and groups
            state["ewc"].adopt(self)
