"""Gradients at what arithmetic made of parameters alone, taken back to the parameters for all samples at once.

A network that makes a table of biases, a mask on a parameter: the samples meet what came of it, and each has its own
gradient there. These are a batch, and so are the gradients at every step before: one backward through the arithmetic,
over all of them, brings each step's to the rule of the function that used the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastewc.per_sample.layout import Layout
from fastewc.per_sample.proxy import Operand, Proxy, edge_of, mapped, replaced
from fastewc.per_sample.rules import LEADING, RULES, Call, Use
from fastewc.per_sample.segments import EXPLICIT, Scale, Segment, back_together


def taken_back(operand: Operand, segments: Sequence[Segment]) -> list[tuple[Operand, Segment]] | None:
    """The same per-sample gradients as uses of the parameters that the operand was made of.

    None where it would cost more than it saves: the gradients at the operand are not there already, they are too many,
    or autograd can't take several back together.
    """
    samples = segments[0].samples
    if not all(isinstance(segment, Scale) for segment in segments):
        return None
    uses: dict[str, list[tuple[Operand, Use]] | None] = {}  # of a parameter; None: some are without a rule
    for step in _steps(operand):
        for name, use in _uses(step, samples):
            known = uses.setdefault(name, [])
            uses[name] = None if known is None or use is None else [*known, (step, use)]
    ruled = [one for found in uses.values() if found is not None for one in found]
    edges: dict[int | str, torch.autograd.graph.GradientEdge] = {
        id(step): step.recipe.edge for step, _ in ruled if step.recipe is not None
    }
    sizes = [operand.value.numel(), *(step.value.numel() for step, _ in ruled)]
    leaves = {name: operand.leaves[name] for name, found in uses.items() if found is None}
    for name, leaf in leaves.items():
        edges[name] = edge_of(leaf)
        sizes.append(leaf.numel())
    if samples * max(sizes) > EXPLICIT:
        return None
    rows = segments[0].rows(0, samples)
    for segment in segments[1:]:
        rows = rows + segment.rows(0, samples)
    gradients = back_together(operand.value, list(edges.values()), rows)
    if gradients is None:
        return None
    at = dict(zip(edges, gradients, strict=True))
    found: list[tuple[Operand, Segment]] = []
    for step, use in ruled:
        own = use.segment(at[id(step)], *use.saved)
        found += [] if own is None else [(use.operand, own)]
    return found + [(Operand.of(name, leaf), Scale(at[name], tuple(leaf.shape))) for name, leaf in leaves.items()]


def _steps(operand: Operand) -> list[Operand]:
    """The operand, and everything that arithmetic made on the way to it, each once."""
    steps, waiting = dict[int, Operand](), [operand]
    while waiting:
        step = waiting.pop()
        if id(step) not in steps:
            steps[id(step)] = step
            assert step.recipe is not None
            waiting += [before for before in step.recipe.operands if before.view is None]
    return list(steps.values())


def _uses(step: Operand, samples: int) -> list[tuple[str, Use | None]]:
    """The parameters that a step used itself, and how: as if its result and all else had a dimension of samples."""
    recipe = step.recipe
    assert recipe is not None
    rule = RULES.get(recipe.func) if recipe.func in LEADING and recipe.unchanged else None
    found: list[tuple[str, Use | None]] = []
    for parameter in (one for one in recipe.operands if one.view is not None):

        def spread(proxy: Proxy, own: Operand = parameter) -> Tensor:
            return proxy if proxy.operand is own else proxy.operand.plain

        uses = None
        if rule is not None:
            content = replaced((list(recipe.args), recipe.kwargs), spread)
            args, kwargs = _lifted(content, step.value.ndim, samples)
            result = step.plain.expand(samples, *step.value.shape)
            uses = rule(Call(recipe.func, args, kwargs, result, Layout(0), samples))
        found.append((parameter.names[0], None if uses is None else uses[0]))
    return found


def _lifted(content: Any, ndim: int, samples: int) -> Any:
    """Every tensor that is no proxy, [...] → [samples, ...] with as many dimensions as the result has."""

    def lift(leaf: Any) -> Any:
        if isinstance(leaf, Proxy) or not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf[(None,) * (ndim - leaf.ndim)]
        return leaf.expand(samples, *leaf.shape)

    return mapped(content, lift)
