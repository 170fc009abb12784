"""Rules that users register for their own layers: asked in backward, and what they say is checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import get_testing_overrides

from fastewc.per_sample import segments
from fastewc.per_sample.proxy import Proxy, all_tensors, found_proxies, replaced, tensors_in
from fastewc.per_sample.rules.base import Call, Use
from fastewc.per_sample.rules.rerun import apart, put_back
from fastewc.per_sample.segments import Scale, Segment
from fastewc.per_sample.user_classes import Run, placed

R = TypeVar("R", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Outer:
    """Per-sample gradients Σ_t grads[n, t, o] · inputs[n, t, i] of a weight, which are reduced without being formed.

    For y = x Wᵀ with a matrix W [O, I]: x, and the gradient at y. A weight of another shape is one that becomes [O, I]
    when its first dimensions are flattened, and its last ones. For y = x W, W [I, O], exchange the two.

    Attributes:
        inputs: [N, I], or [N, T, I] for T positions that share the weight; N as in :func:`per_sample_rule`.
        grads: [N, O] or [N, T, O]. Where the two differ in dtype, the wider one is taken.
    """

    inputs: Tensor
    grads: Tensor


def per_sample_rule(target: Any) -> Callable[[R], R]:
    """Register the per-sample gradients of a layer of your own, so that it is "fused" in Fisher and MAS passes.

    ::

        @fastewc.per_sample_rule(Cube)  # y = (x Wᵀ)³
        def cube(grad_output, x, weight):
            return {"weight": fastewc.Outer(x, 3 * (x @ weight.T) ** 2 * grad_output)}

    The layer itself runs as ever, on constants in place of its parameters, so gradients at inputs are its own. In
    backward the rule gets the gradient at the result, and the arguments of the call as they were in forward (for
    operators and torch functions in the order of the signature) with plain tensors for parameters. For a module it gets
    the module first, which then has plain tensors too: ``rule(grad_output, layer, x)``. Nothing in a rule is
    differentiated; autocast is as it was in forward.

    It returns an entry for every parameter that takes part: by the name of the argument in the signature of ``forward``
    or of the operator ("weights[0]" in a list), by its name inside the module ("weight", "sub.bias"; of a parameter
    with two names, each its own share). An entry is a tensor [N, *shape] of per-sample gradients, an :class:`Outer`, or
    None for no gradient. N is the size of dimension 0 of the result, and each of its rows stands for itself, as if it
    were a sample; those of one sample are then added up. Where a result has the samples elsewhere, its parameters go
    sample by sample ("batch-1" in ``report``, with this reason).

    A rule answers for the result alone. Where a call writes into its arguments or keeps tensors (a state, an auxiliary
    loss), its parameters go sample by sample too. Run a new rule once with ``verify=True``, which compares it with
    autograd. ``impl="reference"`` and ``signal_importance`` use no rules.

    Args:
        target: what the rule is for; a later one for the same target takes its place, as in torch.library.

            * a torch.autograd.Function: where it is called as ``Cube.apply(...)``, not by an alias of ``Cube.apply``
            * an nn.Module class: its ``forward``, inside of hooks; also for what its submodules do; not where the
              instance has another forward, which then goes function by function
            * a custom operator: what torch.library.custom_op returns, torch.ops.x.y or an overload; one stands for all
            * a torch function: replaces its own rule

            A class stands for its subclasses without a rule. The result is a tensor, or a tuple with one
            floating-point tensor. Activation checkpoints may be around a module; those inside of it are refused.

    Returns:
        A decorator that gives the rule back.

    Raises:
        TypeError: a target of another kind, or a function that writes into its arguments; a rule that is not callable.
            In a pass: a rule that returns something else.
        ValueError: in a pass: a parameter without an entry, an entry for no parameter, shapes that do not fit.
    """
    make = _maker(target)

    def register(rule: R) -> R:
        if not callable(rule):
            raise TypeError(f"a per-sample rule must be a function of (grad_output, *arguments), got {rule!r}")
        made = make(rule)
        _RULES[made.target] = made
        return rule

    return register


class UserRule:
    """A rule, what it is for, and how that is called: with one of some signatures."""

    def __init__(self, rule: Run, target: Any, signatures: Sequence[inspect.Signature] = ()) -> None:
        self.rule, self.target, self._signatures = rule, target, signatures
        self.name = getattr(target, "__name__", str(target))

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """By name: all arguments, the parameters among them."""
        return _leaves(self._bound(args, kwargs).arguments)

    def ask(self, g: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the rule says; no argument is a stand-in."""
        bound = self._bound(args, kwargs)  # torch names arguments that its caller has not
        return self.rule(g, *bound.args, **bound.kwargs)

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        count, names = len(args), kwargs.keys()
        fitting = (s for s in self._signatures if count <= len(s.parameters) and names <= s.parameters.keys())
        return next(fitting, self._signatures[0]).bind(*args, **kwargs)

    def uses(self, call: Call) -> list[Use]:
        """One for each parameter; when the first of them makes its segment, the rule is asked for all."""
        named = self.named(call.args, call.kwargs)
        known = tuple(named)  # not what they are: that would stay in memory
        operands = {name: value.operand for name, value in named.items() if isinstance(value, Proxy)}
        content, tensors = apart((list(call.args), call.kwargs))
        rows, samples, device = call.result.shape[0], call.samples, call.result.device.type
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ready = dict[str, Segment | None]()

        def segment(name: str, g: Tensor, *saved: Tensor) -> Segment | None:
            if name not in ready:
                args, kwargs = put_back(replaced(content, lambda proxy: proxy.operand.plain), saved)
                with torch.no_grad(), torch.autocast(device, dtype, autocast):
                    found = self._checked(self.ask(g, args, kwargs), known, operands)
                for one, operand in operands.items():
                    what = f"the rule for {self.name}: {one!r}"
                    ready[one] = _segment(found[one], tuple(operand.value.shape), rows, samples, what)
            return ready.pop(name)

        return [Use(operand, tensors, partial(segment, name)) for name, operand in operands.items()]

    def reach(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, int]]:
        """Tensors that a call might replace or, with their versions, write into."""
        return [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]

    def misfit(self, result: Any, before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> str | None:
        """Why the rule can't be used for a call, if so; what was in its reach before it and after."""
        if len(before) != len(after) or any(a is not b or v != w for (a, v), (b, w) in zip(before, after, strict=True)):
            return f"{self.name} writes into its arguments or keeps tensors, which its rule does not see"
        parts = result if type(result) is tuple else (result,)
        if len(all_tensors(result)) != sum(isinstance(part, Tensor) for part in parts):
            return f"the rule for {self.name} needs a tensor or a tuple as the result, not {type(result).__name__}"
        return None

    def _checked(self, found: Any, known: Sequence[str], wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        rule = f"the rule for {self.name}"
        if not isinstance(found, Mapping):
            raise TypeError(f"{rule} must return a dict from parameter name to gradients, got {type(found).__name__}")
        given = ", ".join(map(str, found)) or "nothing"
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(
                f"{rule} gives nothing for {', '.join(missing)}, which took part in the call; it gives {given}. Return "
                "None for a parameter without a gradient"
            )
        if any(name not in known for name in found):
            raise ValueError(f"{rule} gives {given}; wanted names among {', '.join(known)}")
        return found


class ClassRule(UserRule):
    """Of an autograd Function or a module, and what runs in its place: a call has that and its stand-ins in front."""

    def __init__(self, rule: Run, target: Any) -> None:
        super().__init__(rule, target)
        self.__name__ = f"{self.name}()"  # of no torch function

    def __call__(self, owner: Any, run: Run, inner: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
        """``run`` without our doing; ``inner``: what a module has in the places of its stand-ins."""
        with placed(owner, inner):
            return run(*args, **kwargs)

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """See above."""
        owner: Any
        (owner, run, inner, *args), found = args, dict[str, Any]()
        if isinstance(owner, nn.Module):
            found = {**dict(owner.named_parameters(remove_duplicate=False)), **inner}
        if not found_proxies((args, kwargs)):
            return found
        context = not isinstance(owner, nn.Module) and owner.setup_context is Function.setup_context
        run = run if isinstance(owner, nn.Module) else owner.forward
        own = _leaves(inspect.signature(run).bind(*[None] * context, *args, **kwargs).arguments)
        if context:
            del own[next(iter(own))]
        if twice := found.keys() & own.keys():
            raise ValueError(f"the rule for {self.name}: {', '.join(twice)} names both a parameter and an argument")
        return found | own

    def reach(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[Tensor, int]]:
        """See above; attributes too. Buffers may be written into."""
        modules = args[0].modules() if isinstance(args[0], nn.Module) else ()
        kept = [tensor for module in modules for tensor in all_tensors(vars(module)) if tensor.dtype.is_floating_point]
        return super().reach(args, kwargs) + [(tensor, 0) for tensor in kept]

    def ask(self, g: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See above."""
        owner, _, inner, *args = args
        with placed(owner, inner):
            return self.rule(g, *([owner] if isinstance(owner, nn.Module) else []), *args, **kwargs)


#: By class, by torch function, by operator whatever its overload.
_RULES: dict[Any, UserRule] = {}


def _maker(target: Any) -> Callable[[Run], UserRule]:
    """What makes the rule for a target."""
    if isinstance(target, type) and issubclass(target, (Function, nn.Module)) and target not in (Function, nn.Module):
        return partial(ClassRule, target=target)
    operator = _operator(getattr(target, "_opoverload", target))
    if isinstance(operator, torch._ops.OpOverloadPacket):
        schemas = [getattr(operator, overload)._schema for overload in operator.overloads()]  # type: ignore[no-untyped-call]
        writes, signatures = all(schema.is_mutable for schema in schemas), [_signature(schema) for schema in schemas]
    elif callable(target) and target in get_testing_overrides():
        name = getattr(target, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        signatures = [inspect.signature(get_testing_overrides()[target])]
    else:
        raise TypeError(
            "a per-sample rule is for a torch.autograd.Function class, an nn.Module class, an operator or a torch "
            f"function, got {target!r}. Make an operator of a function of your own: torch.library.custom_op"
        )
    if writes:
        raise TypeError(f"{target} writes into its arguments; a per-sample rule needs a result in memory of its own")
    return partial(UserRule, target=operator, signatures=signatures)


def _signature(schema: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(argument.name, kind, default=None) for argument in schema.arguments])


def _operator(func: Any) -> Any:
    """Of an overload its operator; everything else as it is."""
    return func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func


def rule_of(func: Run) -> UserRule | None:
    """The user's rule for a function that meets a stand-in."""
    return func if isinstance(func, UserRule) else _RULES.get(_operator(func))


def class_rules() -> dict[type, ClassRule]:
    """Those for classes."""
    return {target: rule for target, rule in _RULES.items() if isinstance(rule, ClassRule)}


def _leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those in containers as "weights[0]"."""
    found = dict[str, Any]()
    for name, value in arguments.items():
        if isinstance(value, (tuple, list, dict)):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            found |= _leaves({f"{name}[{key!r}]": part for key, part in parts})
        else:
            found[name] = value
    return found


def _segment(value: Any, shape: tuple[int, ...], rows: int, samples: int, what: str) -> Segment | None:
    """Of what a rule gives for a parameter of this shape; ``rows`` are those of the result."""
    tensors = [value.inputs, value.grads] if isinstance(value, Outer) else [value]
    if value is None:
        return None
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors):
        kinds = ", ".join(str(t.dtype) if isinstance(t, Tensor) else type(t).__name__ for t in tensors)
        raise TypeError(f"{what} must be a floating-point tensor, an Outer of two, or None; got {kinds}")
    sizes = " and ".join(str(list(t.shape)) for t in tensors)
    if not isinstance(value, Outer):
        if value.shape != (rows, *shape):
            raise ValueError(f"{what} must be {[rows, *shape]}: the result's rows, the parameter's shape; got {sizes}")
        return Scale(value.reshape(samples, rows // samples, *shape), shape)
    a, g = tensors
    flattened = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(len(shape) + 1)]
    fits = a.ndim in (2, 3) and a.shape[:-1] == g.shape[:-1] and a.shape[0] == rows
    if not fits or (g.shape[-1], a.shape[-1]) not in flattened:
        raise ValueError(
            f"{what} of shape {list(shape)} needs an Outer of inputs [{rows}, (T,) I] and grads [{rows}, (T,) O] with "
            f"O · I numbers in the parameter; got {sizes}"
        )
    dtype, T = torch.promote_types(a.dtype, g.dtype), math.prod(a.shape[:-1]) // samples
    a, g = (t.to(dtype).reshape(samples, T, t.shape[-1]) for t in (a, g))
    return segments.Outer(a, g, () if shape == (g.shape[-1], a.shape[-1]) else shape)
