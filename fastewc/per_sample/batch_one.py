"""Σ_n |g_n|^p from one backward pass per sample: exact for every model that autograd can differentiate.

Ties, reuse, parameters that never meet the batch dimension, time-major layouts and recurrent nets need no rules here,
because the graph of one sample holds that sample's gradient and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastewc._names import op_dtype

REENTRANT = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class Term:
    """One gradient to take: of Σ seed ⊙ value (of the scalar ``value`` if seed is None), counted ``weight`` times."""

    value: Tensor
    seed: Tensor | None = None
    weight: float = 1.0
    keep_graph: bool = False


class BatchOneSums:
    """Sums Σ weight · |∂value/∂w|^power over terms, float32 (float64 for float64 parameters).

    Args:
        module: the module whose parameters they are; only asked for its other parameters, which a backward may reach.
        parameters: the parameters to differentiate by, under their names.
        power: 2 for Fisher, 1 for MAS.
        foreign: modules that are not in ``module`` may take part in the forward.
    """

    path = "batch-1"
    reason = "one backward pass per sample through autograd"

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], power: int, *, foreign: bool = False
    ) -> None:
        self.power = power
        self._foreign = foreign
        self.sums = {
            name: torch.zeros_like(p, dtype=op_dtype(p), requires_grad=False) for name, p in parameters.items()
        }
        self.used: set[str] = set()
        self.terms = 0
        self.reached = False
        self._module = module
        self._parameters = dict(parameters)
        self._reentrant: bool | None = None

    def add(self, terms: Iterable[Term]) -> None:
        """Add every term; a value that no parameter reaches adds nothing."""
        for term in terms:
            self.terms += 1
            if not term.value.requires_grad:
                continue
            self.reached = True
            for (name, total), gradient in zip(self.sums.items(), self._gradients(term), strict=True):
                if gradient is None:
                    continue
                self.used.add(name)
                dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
                dense = dense.detach().to(total.dtype)
                if self.power == 2:
                    total.addcmul_(dense, dense, value=term.weight)
                else:
                    total.add_(dense.abs(), alpha=term.weight)

    def _gradients(self, term: Term) -> Sequence[Tensor | None]:
        parameters = list(self._parameters.values())
        if self._reentrant is None:
            self._reentrant = any(node.name() == REENTRANT for node in graph_nodes(term.value))
        if self._reentrant:
            return self._gradients_by_backward(term, parameters)
        return torch.autograd.grad(
            term.value, parameters, grad_outputs=term.seed, retain_graph=term.keep_graph, allow_unused=True
        )

    def _gradients_by_backward(self, term: Term, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """The same through ``.grad``: reentrant activation checkpointing refuses torch.autograd.grad."""
        if self._foreign:  # what is used inside a checkpoint is not in the graph, so its .grad can't be put back
            raise NotImplementedError(
                "reentrant activation checkpointing together with forward= is not supported: the gradients of modules "
                "other than the model could not be left alone. Use checkpoint(..., use_reentrant=False)."
            )
        leaves: dict[int, Tensor] = {id(p): p for p in self._module.parameters()}
        for node in graph_nodes(term.value):
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                leaves[id(leaf)] = leaf
        if any(getattr(leaf, "_post_accumulate_grad_hooks", None) for leaf in leaves.values()):
            raise NotImplementedError(
                "reentrant activation checkpointing together with post-accumulate-grad hooks (an optimizer that "
                "steps inside backward?) is not supported: the pass would fire them. Use checkpoint(..., "
                "use_reentrant=False)."
            )
        with _empty_gradients(leaves.values()):
            torch.autograd.backward(term.value, term.seed, retain_graph=term.keep_graph)
            return [p.grad for p in parameters]


@contextmanager
def _empty_gradients(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Set every leaf's .grad aside and put the same tensor back afterwards."""
    kept = [(leaf, leaf.grad) for leaf in leaves]
    for leaf, _ in kept:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in kept:
            leaf.grad = gradient


def graph_nodes(value: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the autograd graph behind ``value``, each once."""
    waiting = [value.grad_fn] if value.grad_fn is not None else []
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
