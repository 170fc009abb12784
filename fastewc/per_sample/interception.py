"""What happens to a torch function that meets a stand-in of a parameter."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastewc.per_sample.batch_one import leaves_behind
from fastewc.per_sample.layout import broadcasts
from fastewc.per_sample.proxy import (
    Operand,
    Picked,
    Proxy,
    Recipe,
    all_tensors,
    found_proxies,
    identity,
    replaced,
    tensors_in,
)
from fastewc.per_sample.unrolled import unrolled
from fastewc.per_sample.user_rules import rule_of

#: Functions that move entries of their first argument, and do not change, mix or repeat them.
MOVES = frozenset(
    {
        "t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "view", "view_as", "reshape",
        "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "chunk", "split", "split_with_sizes",
        "tensor_split", "unsafe_chunk", "unsafe_split", "unbind", "narrow", "select", "__getitem__", "T", "mT",
    }
)  # fmt: skip
#: Functions that hand on the same entries, cast or copied.
CASTS = frozenset(
    {"to", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "cpu", "cuda", "alias"}
)
#: Functions of each entry, whatever else they are given being constants.
ELEMENTWISE = frozenset(
    {
        "abs", "add", "clamp", "clamp_max", "clamp_min", "clip", "cos", "div", "divide", "elu", "exp", "exp2", "expm1",
        "gelu", "leaky_relu", "log", "log1p", "log_sigmoid", "mul", "multiply", "neg", "negative", "pow", "radd",
        "rdiv", "reciprocal", "relu", "rmul", "rpow", "rsqrt", "rsub", "rtruediv", "sigmoid", "silu", "sin", "softplus",
        "sqrt", "square", "sub", "subtract", "tanh", "true_divide", "truediv",
    }
)  # fmt: skip
_BY_ENTRY = ELEMENTWISE | {"zero", "fill", "setitem"}
#: Functions that write into their first argument, elementwise; other arguments are broadcast to it.
FILLS = frozenset(
    {
        "add_", "sub_", "mul_", "div_", "multiply_", "divide_", "true_divide_", "subtract_", "copy_", "pow_", "lerp_",
        "addcmul_", "addcdiv_", "clamp_min_", "clamp_max_", "__setitem__",
    }
)  # fmt: skip
#: Functions that can't be answered for a parameter: its stand-in has no gradient, and may be of many.
REFUSED = frozenset({"__set__", "backward", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
#: Functions whose result is a constant to autograd.
CONSTANTS = frozenset({"detach", "data", "numpy", "item", "tolist"})

COMPLEX = "complex numbers were made of it"

#: Products of a tensor with a matrix.
_FOLDING = frozenset({F.linear, torch.matmul, Tensor.matmul})

Key = tuple[Any, ...]
_LONGEST = 500


def name_of(func: Callable[..., Any]) -> str:
    """Its name; for the getter of an attribute that of the attribute."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """True for functions that write into an argument that the caller may go on using."""
    name = name_of(func)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or kwargs.get("out") is not None


def _no(*_: Any) -> bool:
    return False


@functools.cache
def opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function of torch.nn.functional written in Python, such that we see the functions it calls.

    Its own code, with the answer No to its question whether an argument overrides it; None for everything else.
    """
    if not isinstance(func, types.FunctionType) or func.__module__ != F.__name__:
        return None
    questions = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _no)
    inside = types.FunctionType(
        func.__code__, {**func.__globals__, **questions}, func.__name__, func.__defaults__, func.__closure__
    )
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


class Interception:
    """Runs functions for proxies. Subclasses say what is batched and what is made of parameters alone."""

    active = False

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names  # of the parameters, by id

    def names_of(self, leaves: Iterable[Tensor]) -> set[str]:
        """Of the parameters that are among these tensors, or that proxies among them stand for."""
        names: set[str] = set()
        for leaf in leaves:
            if isinstance(leaf, Proxy):
                names.update(leaf.operand.names)
            elif id(leaf) in self._names:
                names.add(self._names[id(leaf)])
        return names

    def names_behind(self, tensors: Iterable[Tensor]) -> set[str]:
        """Of the parameters that gradients at these tensors would go on to, by ways that torch alone knows."""
        return self.names_of(leaf for tensor in tensors for leaf in leaves_behind(tensor))

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The function's result."""
        if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap, grad: tensors there hide the samples
            return self.escape(func, args, kwargs, f"{name_of(func)} inside a transform of torch.func")
        if name_of(func) in REFUSED:
            raise NotImplementedError(
                f"the forward calls {name_of(func)} on a parameter, or on what it made of one, which has no gradient "
                "while whole batches are measured. Use impl='reference', which takes every sample by itself"
            )
        inside = None if rule_of(func) else opened(func) or unrolled(func, args)
        if inside is not None:
            return inside(*args, **kwargs)
        if writes(func, kwargs):
            return self.written(func, args, kwargs)
        if name_of(func) in CONSTANTS:
            return func(*_plain(args), **_plain(kwargs))
        if func is F.scaled_dot_product_attention and not any(isinstance(arg, Proxy) for arg in args[:3]):
            args, kwargs = self._with_spread_bias(args, kwargs)
            if not found_proxies((args, kwargs)):
                return func(*args, **kwargs)
        proxies = found_proxies((args, kwargs))
        others = tensors_in((args, kwargs))
        if any(tensor.is_nested for tensor in others):
            return self.escape(func, args, kwargs, f"{name_of(func)} of a nested tensor, which hides the samples")
        operands = dict.fromkeys(proxy.operand.key for proxy in proxies)
        key = (func, tuple(operands), tuple(t.ndim for t in others))
        return self.decide(key, func, args, kwargs)

    def written(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A function that writes: what it is given is repeated for the samples first, so that torch can do the rest."""
        why = f"{name_of(func)} writes into a tensor"
        target = args[0]
        if isinstance(target, Proxy) and target.operand.made and torch.is_grad_enabled():
            by_entry = name_of(func).strip("_") in _BY_ENTRY and len(all_tensors((args, kwargs))) == 1
            target.operand.memory.mixed |= not by_entry
            self.rewritten(target.operand, alone=not tensors_in((args, kwargs)))
            func(*_values(args), **_values(kwargs))  # becomes a part of how it was made
            return target
        if isinstance(target, Proxy) or name_of(func) not in FILLS or kwargs.get("out") is not None:
            return self.escape(func, args, kwargs, why)
        place = target.detach()[args[1]] if name_of(func) == "__setitem__" else target.detach()
        args, kwargs = self.spread((list(args), kwargs), place)
        if found_proxies((args, kwargs)):
            return self.escape(func, args, kwargs, why)
        return func(*args, **kwargs)

    def made(self, proxy: Proxy) -> None:
        """There is a stand-in for something that was made of parameters."""

    def rewritten(self, operand: Operand, *, alone: bool) -> None:
        """The memory of something made of parameters is about to change; ``alone``: by nothing but numbers."""

    def spread(self, content: Any, place: Tensor) -> Any:
        """The same with every stand-in expanded to the shape of ``place``, if it broadcasts to that."""

        def change(proxy: Proxy) -> Any:
            return self.call(Tensor.expand_as, (proxy, place), {}) if broadcasts(proxy.shape, place.shape) else proxy

        return replaced(content, change)

    def decide(self, key: Key, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of a function that may give tensors; ``key`` names the call, the same in every run."""
        raise NotImplementedError

    def _with_spread_bias(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Attention with a bias that is a parameter's: every sample gets its own, so that torch can do the rest."""
        bound = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key = bound.get("query"), bound.get("key")
        if not isinstance(query, Tensor) or not isinstance(key, Tensor):
            return args, kwargs
        place = query.detach()[..., :1].expand(*query.shape[:-1], key.shape[-2])
        return self.spread((list(args), kwargs), place)

    def escape(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], why: str) -> Any:
        """Leave it to torch: gradients then arrive at the proxies themselves, which shows in the graph."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def plainly(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result with the parameters as constants."""
        if func in _FOLDING and len(args) > 1 and isinstance(args[1], Proxy) and args[1].ndim == 2:
            x = args[0]
            # As for a weight that needs a gradient: of a constant, torch would make a batch of copies instead.
            args = [x.contiguous() if isinstance(x, Tensor) and x.ndim > 2 else x, *args[1:]]
        return func(*_plain(args), **_plain(kwargs))

    def derived(self, key: Key, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result for parameters alone: proxies again, for each floating-point tensor in it."""
        operands = [proxy.operand for proxy in found_proxies((args, kwargs))]
        with torch.enable_grad():
            result = func(*_values(args), **_values(kwargs))
        if any(tensor.is_complex() for tensor in tensors_in(result)):
            return self.escape(func, args, kwargs, COMPLEX)
        constant = not torch.is_grad_enabled()  # or of a checkpoint, which will run it anew
        name = f"{name_of(func)}({', '.join(operand.key for operand in operands)})"
        if len(name) > _LONGEST:  # of what is made of itself again and again
            name = hashlib.sha256(name.encode()).hexdigest()

        def wrap(tensor: Any, index: int | None) -> Any:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.requires_grad:
                return tensor
            view, picked, slope = None, None, None
            if len(operands) == 1:
                view, picked, slope = _entries(operands[0], func, args, kwargs, tensor, index)
            names = tuple(dict.fromkeys(name for operand in operands for name in operand.names))
            leaves = {name: leaf for operand in operands for name, leaf in operand.leaves.items()}
            key = name if index is None else f"{name}[{index}]"
            memory = next((o.memory for o in operands if _shared(o.value, tensor)), None)
            recipe = Recipe.of(func, args, kwargs, tensor)
            proxy = Proxy.of(Operand(key, names, tensor, view, leaves, picked, slope, constant, recipe, memory), self)
            self.made(proxy)
            return proxy

        if isinstance(result, (tuple, list)):
            return type(result)(wrap(tensor, i) for i, tensor in enumerate(result))
        return wrap(result, None)


def _plain(content: Any) -> Any:
    return replaced(content, lambda proxy: proxy.operand.plain)


def _values(content: Any) -> Any:
    return replaced(content, lambda proxy: proxy.operand.value)


def _entries(
    source: Operand, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Tensor,
    index: int | None,
) -> tuple[Callable[[Tensor], Tensor] | None, Picked | None, Tensor | None]:  # fmt: skip
    """View, picked and slope of a result, see :class:`Operand`; no view if arithmetic mixed the entries."""
    before = source.view
    if before is None:
        return None, None, None
    first = bool(args) and isinstance(args[0], Proxy)
    move = _move(source, func, args, kwargs, result, index) if first else None
    if move is identity:
        return before, source.picked, source.slope
    if move is not None:
        return lambda whole: move(before(whole)), source.picked, None if source.slope is None else move(source.slope)
    slope = _slope(source, func, result)
    if slope is not None:
        return before, None, slope
    picked = _picked(source, func, args, kwargs, result) if first else None
    return None if picked is None else identity, picked, None


def _move(
    source: Operand, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Tensor,
    index: int | None,
) -> Callable[[Tensor], Tensor] | None:  # fmt: skip
    """Takes the result's entries out of a tensor like the source; None if they are not simply there."""
    name = name_of(func)
    if name in CASTS:
        return identity
    if name not in MOVES or (source.value.numel() and not _shared(source.value, result)):
        return None

    def move(before: Tensor) -> Tensor:
        found = func(before, *args[1:], **kwargs)
        part: Tensor = found if index is None else found[index]
        return part

    return move


def _slope(source: Operand, func: Callable[..., Any], result: Tensor) -> Tensor | None:
    """Of a function of each entry, by the parameter's entries; None if it was something else."""
    known = source.picked is None and name_of(func).strip("_") in ELEMENTWISE
    if not known or result.shape != source.value.shape:
        return None
    (slope,) = torch.autograd.grad(result, source.value, torch.ones_like(result), retain_graph=True)
    return slope if source.slope is None else slope * source.slope


def _shared(one: Tensor, other: Tensor) -> bool:
    """True if they are in the same memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _picked(
    source: Operand, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Tensor
) -> Picked | None:
    """Rows that were taken out of a table; None if it was something else."""
    table = source.slope is None and source.picked is None and source.value.ndim == 2
    if not table or kwargs.get("sparse_grad"):
        return None
    name, padding = name_of(func), None
    ids: Any
    if name == "embedding":
        ids, padding, by_frequency = ([*args[1:4], None, None, None])[:3]
        if by_frequency or kwargs.get("scale_grad_by_freq"):
            return None
        padding = kwargs.get("padding_idx", padding)
    elif name == "__getitem__":
        ids = torch.tensor(args[1], device=result.device) if isinstance(args[1], list) else args[1]
    elif name == "index_select" and len(args) == 3 and args[1] in (0, -2):
        ids = args[2]
    else:
        return None
    V, E = source.value.shape
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64) or result.shape != (*ids.shape, E):
        return None
    ids = ids.detach().long()
    if name == "__getitem__":
        ids = ids % V
    return Picked(source, ids, result.detach(), -1 if padding is None else padding)
