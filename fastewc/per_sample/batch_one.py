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
        sums: totals to add to; new ones if None.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        power: int,
        *,
        foreign: bool = False,
        sums: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.power = power
        self._foreign = foreign
        self.sums = {name: zeros_for(p) if sums is None else sums[name] for name, p in parameters.items()}
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
        with empty_gradients(self._module, graph_leaves(graph_nodes(term.value)), foreign=self._foreign):
            torch.autograd.backward(term.value, term.seed, retain_graph=term.keep_graph)
            return [p.grad for p in parameters]


def zeros_for(parameter: Tensor) -> Tensor:
    """A total for a parameter: float32 (float64 for float64) zeros of its shape."""
    return torch.zeros_like(parameter, dtype=op_dtype(parameter), requires_grad=False)


@contextmanager
def empty_gradients(module: nn.Module, reached: Iterable[Tensor], *, foreign: bool) -> Iterator[list[Tensor]]:
    """For a backward into ``.grad``, which reentrant activation checkpointing needs: it refuses torch.autograd.grad.

    Sets the .grad of the module's parameters and of the leaves that the graph reaches aside, and puts the same tensors
    back afterwards. Yields these leaves.

    Raises:
        NotImplementedError: gradients of others would change (``foreign`` modules take part), or hooks would fire.
    """
    if foreign:  # what is used inside a checkpoint is not in the graph, so its .grad can't be put back
        raise NotImplementedError(
            "reentrant activation checkpointing together with forward= is not supported: the gradients of modules "
            "other than the model could not be left alone. Use checkpoint(..., use_reentrant=False)."
        )
    leaves = list({id(leaf): leaf for leaf in (*module.parameters(), *reached)}.values())
    if any(getattr(leaf, "_post_accumulate_grad_hooks", None) for leaf in leaves):
        raise NotImplementedError(
            "reentrant activation checkpointing together with post-accumulate-grad hooks (an optimizer that "
            "steps inside backward?) is not supported: the pass would fire them. Use checkpoint(..., "
            "use_reentrant=False)."
        )
    kept = [(leaf, leaf.grad) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield leaves
    finally:
        for leaf, gradient in kept:
            leaf.grad = gradient


def leaves_behind(tensor: Tensor) -> list[Tensor]:
    """The tensors whose .grad a gradient that arrives at this one would be added to."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    return graph_leaves(graph_nodes(tensor))


def graph_leaves(nodes: Iterable[torch.autograd.graph.Node]) -> list[Tensor]:
    """The tensors whose .grad the nodes of a graph would add to."""
    return [leaf for node in nodes if isinstance(leaf := getattr(node, "variable", None), Tensor)]


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
