"""What every rule works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastewc.per_sample.layout import Layout
from fastewc.per_sample.proxy import Operand, Proxy
from fastewc.per_sample.segments import Segment


@dataclass(frozen=True)
class Use:
    """One operand of a call: ``segment(g, *saved)`` makes its segment from the gradient at the call's result.

    None where a rule knows that there is no gradient.
    """

    operand: Operand
    saved: tuple[Tensor, ...]
    segment: Callable[..., Segment | None]


@dataclass
class Call:
    """A torch function with batched operands and at least one proxy; ``layout`` is that of its result.

    ``args``, ``kwargs`` and ``result`` are there while a rule looks at the call. A segment, made in backward, gets what
    its use has saved: anything else it held on to would stay in memory, checkpoints or not.
    """

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Tensor
    layout: Layout
    samples: int

    def forget(self) -> None:
        """Let go of the tensors."""
        self.args, self.kwargs = (), {}
        del self.result

    def bound(self, *names: str) -> tuple[Any, ...]:
        """The arguments by position or name; None for one that is absent."""
        return tuple(self.args[i] if i < len(self.args) else self.kwargs.get(name) for i, name in enumerate(names))

    def split(self, tensor: Tensor) -> Tensor:
        """[N, *shape], for a tensor with the samples where the result has them."""
        return self.layout.split(tensor, self.samples)

    def tokens(self, tensor: Tensor) -> Tensor:
        """[N, T, I]: everything between samples and the last dimension flattened."""
        return self.split(tensor).flatten(1, -2)


Rule = Callable[[Call], "list[Use] | None"]
#: torch function -> its rule.
RULES: dict[Callable[..., Any], Rule] = {}
#: Those that give the same with any dimensions put in front of their arguments, parameters aside.
LEADING: set[Callable[..., Any]] = set()


def rule(*functions: Callable[..., Any], leading: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions; ``leading``: they go into ``LEADING``."""

    def register(one: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, one))
        LEADING.update(functions if leading else ())
        return one

    return register


def is_proxy(value: object) -> bool:
    """True for a stand-in of a parameter."""
    return isinstance(value, Proxy)
