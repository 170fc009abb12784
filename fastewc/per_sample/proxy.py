"""Stand-ins for parameters: every torch function that takes one of them comes to us.

During a pass each trainable parameter's slot in its module holds a :class:`Proxy`. It stays there through backward, so
that what activation checkpointing recomputes is caught as well. What an op gives is computed by torch itself, with the
plain weight as a constant: input gradients are torch's own, and nobody computes the ordinary weight gradient. A
:class:`Tap` on the result hands its gradient to the uses of the parameters, and a gate for each parameter, an input of
all its taps, fires once the last of them has (the engine of autograd calls a node when all that depends on it is done).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

P = TypeVar("P", bound="Proxy")


class Catcher(Protocol):
    """Who decides what a torch function with proxies among its arguments does.

    ``active`` while its proxies are in place. One that a model has kept (in a cache of its own) and uses afterwards is
    what it stands for.
    """

    active: bool

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of ``func``."""


class Operand:
    """What a proxy stands for: a parameter, or what was made of parameters alone.

    Attributes:
        key: the same in every run of the model, e.g. the parameter's name.
        names: the parameters it was made of.
        value: the plain tensor. For one that arithmetic made (``view`` is None) it carries the graph to ``leaves``.
        view: gives the part of a parameter-shaped tensor that this operand is (a transpose, a chunk, a cast: entries
            are moved, never mixed); None if arithmetic made it, or a write into its memory since.
        leaves: for arithmetic, by name: the parameters, which ``value``'s graph ends in.
        picked: where it came from, if it is made of rows of a table; ``view`` is then of a tensor like these rows.
        slope: of the entries by those of the parameter, where each was made of one (exp(w), 1 + w); None for 1.
        constant: made under no_grad; what autograd records does not see where it came from.
        recipe: how it was made; None for a parameter.
        memory: shared by the operands that share memory.
    """

    def __init__(
        self,
        key: str,
        names: tuple[str, ...],
        value: Tensor,
        view: Callable[[Tensor], Tensor] | None,
        leaves: dict[str, Tensor],
        picked: Picked | None = None,
        slope: Tensor | None = None,
        constant: bool = False,
        recipe: Recipe | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.key, self.names, self.value, self.leaves = key, names, value, leaves
        self.constant, self.recipe, self.memory = constant, recipe, memory or Memory()
        self._moved, self._version, self._slope = (view, picked), value._version, slope

    @classmethod
    def of(cls, name: str, leaf: Tensor) -> Operand:
        """A whole parameter."""
        return cls(name, (name,), leaf, identity, {name: leaf})

    @property
    def view(self) -> Callable[[Tensor], Tensor] | None:
        """See above."""
        view, picked = self._moved
        return None if self.rewritten and (self.memory.mixed or picked is not None) else view

    @property
    def picked(self) -> Picked | None:
        """See above."""
        return None if self.rewritten else self._moved[1]

    @property
    def slope(self) -> Tensor | None:
        """See above; after a write it is another one."""
        if self.rewritten and self.view is not None:
            leaf, ones = self.leaves[self.names[0]], torch.ones_like(self.value)
            (of_leaf,) = torch.autograd.grad(self.value, leaf, ones, retain_graph=True)
            self._slope, self._version = self.view(of_leaf), self.value._version
        return self._slope

    def moved(self, key: str, move: Callable[[Tensor], Tensor]) -> Operand:
        """The operand with its entries in another order."""
        before = self.view
        view = None if before is None else lambda whole: move(before(whole))
        slope = None if self.slope is None else move(self.slope)
        return Operand(key, self.names, move(self.value), view, self.leaves, self.picked, slope, memory=self.memory)

    @property
    def whole(self) -> bool:
        """True for a parameter as it is."""
        return self.view is identity and self.slope is None and self.picked is None

    @property
    def made(self) -> bool:
        """True for memory of its own, and with a graph: autograd then allows a write, and follows it."""
        memory = self.value.untyped_storage().data_ptr()
        own = all(leaf.untyped_storage().data_ptr() != memory for leaf in self.leaves.values())
        return own and self.value.grad_fn is not None

    @property
    def rewritten(self) -> bool:
        """True after a write into its memory."""
        return self.value._version != self._version and self.made

    @property
    def plain(self) -> Tensor:
        """The value as a constant."""
        return self.value.detach()


@dataclass(frozen=True)
class Recipe:
    """A function of parameters alone, and its arguments; ``edge``: where gradients at its result arrive."""

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    edge: torch.autograd.graph.GradientEdge
    versions: list[int]

    @classmethod
    def of(cls, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Tensor) -> Recipe:
        """That of a function that has just been called."""
        return cls(func, args, kwargs, edge_of(result), [one.value._version for one in _operands(args, kwargs)])

    @property
    def operands(self) -> list[Operand]:
        """What it was given, each once."""
        return list({id(one): one for one in _operands(self.args, self.kwargs)}.values())

    @property
    def unchanged(self) -> bool:
        """True if nothing has been written into its arguments since."""
        return self.versions == [one.value._version for one in _operands(self.args, self.kwargs)]


def _operands(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Operand]:
    return [proxy.operand for proxy in found_proxies((args, kwargs))]


@dataclass
class Memory:
    """What was written into what arithmetic made; ``mixed``: something else than numbers, entry by entry."""

    mixed: bool = False


@dataclass(frozen=True)
class Picked:
    """Rows of a table that every sample picks alike: positions, relative positions."""

    table: Operand  # [V, E], with a view
    ids: Tensor
    rows: Tensor  # [*ids.shape, E]
    padding: int  # an id that gets no gradient


class Proxy(Tensor):
    """A tensor in the place of what was made of parameters."""

    operand: Operand
    catcher: Catcher

    @classmethod
    def of(cls: type[P], operand: Operand, catcher: Catcher) -> P:
        """A leaf on the operand's memory that requires a gradient: one that arrives there escaped us."""
        proxy: P = torch.Tensor._make_subclass(cls, operand.plain, True)
        proxy.operand, proxy.catcher = operand, catcher
        return proxy

    @property
    def itself(self) -> Tensor:
        """What torch would have here without us: a constant, or with a graph to the parameters."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.grad_fn is not None:  # a custom Function has returned it
                return self.as_subclass(Tensor)
        return self.operand.plain if self.operand.constant else self.operand.value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Everything that torch does with a proxy."""
        kwargs, name, attribute = kwargs or {}, getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if name == "__get__" or (name == "__set__" and attribute is Tensor.grad):
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args)
            if not isinstance(found, Tensor) or attribute in (Tensor.data, Tensor.grad):
                return found
        proxies = found_proxies((args, kwargs))
        if not all(proxy.catcher.active for proxy in proxies):
            args, kwargs = replaced((args, kwargs), lambda p: p if p.catcher.active else p.itself)
            proxies = found_proxies((args, kwargs))
        return proxies[0].catcher.call(func, args, kwargs) if proxies else func(*args, **kwargs)


class Slot(Proxy, nn.Parameter):
    """In the place of a parameter itself. Only this is one: a module that is given a parameter keeps it as its own."""


def identity(whole: Tensor) -> Tensor:
    """The view that is all of it."""
    return whole


def edge_of(tensor: Tensor) -> Any:
    """Where its gradient arrives, for torch.autograd.grad."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.autograd.graph.get_gradient_edge(tensor)


def found_proxies(content: Any) -> list[Proxy]:
    """Every proxy in nested arguments, in order."""
    return [tensor for tensor in all_tensors(content) if isinstance(tensor, Proxy)]


def tensors_in(content: Any) -> list[Tensor]:
    """Every tensor in nested arguments that is no proxy, in order."""
    return [tensor for tensor in all_tensors(content) if not isinstance(tensor, Proxy)]


def all_tensors(content: Any) -> list[Tensor]:
    """Every tensor in nested arguments, in order."""
    found: list[Tensor] = []
    _gather(content, found)
    return found


def _gather(content: Any, found: list[Tensor]) -> None:
    if isinstance(content, Tensor):
        found.append(content)
    elif isinstance(content, (tuple, list)):
        for part in content:
            _gather(part, found)
    elif isinstance(content, dict):
        for part in content.values():
            _gather(part, found)


def replaced(content: Any, change: Callable[[Proxy], Any]) -> Any:
    """The same nested arguments with something else in place of each proxy."""
    return mapped(content, lambda leaf: change(leaf) if isinstance(leaf, Proxy) else leaf)


def mapped(content: Any, change: Callable[[Any], Any]) -> Any:
    """Nested arguments with ``change`` of every leaf; a container in which nothing changes is the same object.

    A function may write into a list that it is given, and means the caller's.
    """
    if isinstance(content, dict):
        values = [mapped(part, change) for part in content.values()]
        same = all(a is b for a, b in zip(values, content.values(), strict=True))
        return content if same else dict(zip(content, values, strict=True))
    if not isinstance(content, (tuple, list)):
        return change(content)
    parts = [mapped(part, change) for part in content]
    if all(a is b for a, b in zip(parts, content, strict=True)):
        return content
    return type(content)(*parts) if hasattr(content, "_fields") else type(content)(parts)


class Slots:
    """Every place in a module tree that holds one of the parameters.

    Args:
        proxies: what stands in for a parameter, by id.
        catcher: whose proxies they are.
        module: the tree.
        parameters: the parameters.

    Attributes:
        shown: the proxies and the parameters: what a gradient arrives at when something escaped us.
        edges: where it would arrive, for torch.autograd.grad.
    """

    def __init__(
        self, proxies: dict[int, Slot], catcher: Catcher, module: nn.Module, parameters: Sequence[nn.Parameter]
    ) -> None:
        self._proxies, self._catcher, self._module = proxies, catcher, module
        self.shown: list[Tensor] = [*proxies.values(), *parameters]
        self.edges = [edge_of(tensor) for tensor in self.shown]
        self._places = [
            (owner._parameters, name, parameter)
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if id(parameter) in proxies
        ]

    @contextmanager
    def in_place(self) -> Iterator[Slots]:
        """Inside, the module has the proxies. What a forward makes of them and keeps is taken away again."""
        attributes = [(owner.__dict__, dict(owner.__dict__)) for owner in self._module.modules()]
        try:
            for slots, name, parameter in self._places:
                slots[name] = self._proxies[id(parameter)]
            self._catcher.active = True
            yield self
        finally:
            self._catcher.active = False
            for slots, name, parameter in self._places:
                slots[name] = parameter
            for content, before in attributes:
                for name in [name for name, value in content.items() if _has_proxy(value)]:
                    if name in before:
                        content[name] = before[name]
                    else:
                        del content[name]


def _has_proxy(value: Any) -> bool:
    """Of an attribute. Recurrent layers make a list of their weights, and one of references, when weights change."""
    some = value if type(value) is list else [value]
    return any(isinstance(one() if isinstance(one, weakref.ref) else one, Proxy) for one in some)


class Tap(torch.autograd.Function):
    """Identity; in backward ``arrive(g, *saved)`` is called with the gradient and the saved tensors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, arrive: Callable[..., None], gates: int, *tensors: Tensor) -> Tensor:
        """``tensors``: the gates, then what to save (through save_for_backward, which checkpointing hooks into)."""
        ctx.arrive, ctx.count = arrive, len(tensors)
        ctx.save_for_backward(*tensors[gates:])
        ctx.set_materialize_grads(False)
        return y.detach()  # no view: an op in place may follow

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradient goes on as it is."""
        (g,) = grads
        if g is not None:
            ctx.arrive(g, *ctx.saved_tensors)
        return (g, None, None, *([None] * ctx.count))


class Gate(torch.autograd.Function):
    """Calls ``last`` in backward, after every tap it is an input of."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, last: Callable[[], None]) -> Tensor:
        """A scalar that requires a gradient, and never gets one."""
        ctx.last = last
        ctx.set_materialize_grads(False)
        return leaf.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Nothing comes, and nothing goes on."""
        ctx.last()
        return None, None
