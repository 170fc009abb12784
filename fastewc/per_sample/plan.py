"""Which functions a model calls with its parameters, and where their results have the samples: found by running it.

One run with one sample and one with two: what is as large in both was made of parameters alone, what grows is batched,
and a dimension that holds samples and something else is read in the order in which the first sample's values are found.
Nothing is assumed about names, layouts or the order of dimensions; where shapes and values leave a doubt, the
parameter's gradients are taken sample by sample. Sizes may depend on the data, as the length of the longest sample: one
of the two alone then has the size that both have together, so where the first leaves a doubt, it is the second's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastewc.per_sample.interception import COMPLEX, Interception, Key, name_of
from fastewc.per_sample.layout import Layout, Unclear, confirmed, layout_of
from fastewc.per_sample.picking import Picking
from fastewc.per_sample.proxy import Operand, found_proxies, replaced, tensors_in
from fastewc.per_sample.user_rules import rule_of

Decision = Layout | Literal["derived"]
_RUNS = 12


@dataclass
class Plan:
    """What to do with each call; ``given_up``: parameter -> why it has to go sample by sample."""

    decisions: dict[Key, Decision] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    unclear: bool = False  # that something was given up because of shapes or values
    uses: dict[str, int] = field(default_factory=dict)  # parameter -> batched calls with it in a forward
    largest: int = 1  # numbers per sample of the largest operand or result
    activations: int = 1  # and of all results together


class Planner(Interception):
    """Watches a model run with one sample and with two, and makes a :class:`Plan`; ``alone``: which of the two."""

    def __init__(self, names: Mapping[int, str], alone: int) -> None:
        super().__init__(names)
        self.plan = Plan()
        self._alone = alone
        self._samples = 0
        self._seen: dict[int, dict[Key, list[Any]]] = {1: {}, 2: {}}
        self._treated: dict[Key, set[bool]] = {}  # as derived or not, in the latest two runs
        self._made_of: dict[str, tuple[str, ...]] = {}  # operand -> names of its parameters
        self._picking = Picking()
        self._before: Any = None  # what the latest two runs called, and how it was treated
        self._met: dict[int, Tensor] = {}  # memory, kept, of what samples have met in this run

    def watch(self, run: Callable[[int, int], None]) -> Plan:
        """``run(start, stop)`` runs the model on these of the samples, with proxies in place."""
        for _ in range(_RUNS):
            self._treated = {}
            for samples in (2, 1):
                self._samples, self._seen[samples], self._met = samples, {}, {}
                with self._picking if samples == 2 else nullcontext():
                    run(*((0, 2) if samples == 2 else (self._alone, self._alone + 1)))
            if self._settle():
                break
        else:
            self._give_up(self._seen[1], "the functions that a forward calls depend on the number of samples")
        for key, calls in self._seen[1].items():
            if isinstance(self.plan.decisions.get(key), Layout):
                for name in {name for operand in key[1] for name in self._made_of[operand]}:
                    self.plan.uses[name] = self.plan.uses.get(name, 0) + len(calls)
        return self.plan

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The function's result; what was made under no_grad is a constant outside of it."""
        if torch.is_grad_enabled() and any(proxy.operand.constant for proxy in found_proxies((args, kwargs))):
            args, kwargs = replaced((args, kwargs), lambda proxy: proxy.itself if proxy.operand.constant else proxy)
            if not found_proxies((args, kwargs)):
                return func(*args, **kwargs)
        return super().call(func, args, kwargs)

    def decide(self, key: Key, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run it, keep what it gave, and go on as far as is known."""
        rule = rule_of(func)
        before = None if rule is None else rule.reach(args, kwargs)
        result = self.plainly(func, args, kwargs)
        operands = [proxy.operand for proxy in found_proxies((args, kwargs))]
        if all(name in self.plan.given_up for operand in operands for name in operand.names):
            return result
        if any(tensor in self._picking for tensor in tensors_in((args, kwargs))):
            for operand in operands:
                self._refuse(operand.names, f"{name_of(func)} of entries that were picked or sorted by value")
        if _counts_in_batch(func, args, kwargs):
            for operand in operands:
                self._refuse(operand.names, "scale_grad_by_freq counts the ids of a whole batch")
        if rule is not None and before is not None:
            why = rule.misfit(result, before, rule.reach(args, kwargs))
            if why is not None:
                self._refuse([name for operand in operands for name in operand.names], why)
                return result
        if any(t.is_complex() for t in tensors_in(result)):
            return self.escape(func, args, kwargs, COMPLEX)
        tensors = [t for t in tensors_in(result) if t.is_floating_point()]
        if not tensors:
            return result
        given = [t.detach() for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        self._seen[self._samples].setdefault(key, []).append(([t.detach() for t in tensors], given))
        decision = self.plan.decisions.get(key)
        if decision is None:
            decision = "derived" if self._looks_derived(key, args, kwargs, tensors) else None
        self._treated.setdefault(key, set()).add(decision == "derived")
        self._made_of.update((proxy.operand.key, proxy.operand.names) for proxy in found_proxies((args, kwargs)))
        if decision == "derived":
            if behind := self.names_behind(tensors_in((args, kwargs))):
                names = (*behind, *(name for operand in operands for name in operand.names))
                self._refuse(
                    names,
                    f"{name_of(func)} of it and of what was made of a parameter in a way that no torch function shows",
                )
                return result
            return self.derived(key, func, args, kwargs)
        self._met.update((operand.value.untyped_storage().data_ptr(), operand.value) for operand in operands)
        return result

    def rewritten(self, operand: Operand, *, alone: bool) -> None:
        """What samples have met before must stay what it was then."""
        if not alone or operand.value.untyped_storage().data_ptr() in self._met:
            self._refuse(operand.names, "written into after samples have met it, or with another tensor")

    def escape(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], why: str) -> Any:
        """Not ours to follow."""
        for proxy in found_proxies((args, kwargs)):
            self._refuse(proxy.operand.names, why)
        return super().escape(func, args, kwargs, why)

    def _looks_derived(self, key: Key, args: Sequence[Any], kwargs: dict[str, Any], results: list[Tensor]) -> bool:
        """As large as in the latest run of the other number of samples; before that a guess that :meth:`_settle` mends.

        Nothing else took part, and there is nothing in it with the number of samples, or not more than in a parameter.
        """
        before, index = self._seen[3 - self._samples].get(key, []), len(self._seen[self._samples][key]) - 1
        if index < len(before):
            return [t.shape for t in before[index][0]] == [t.shape for t in results]
        others = tensors_in((args, kwargs))
        alone = not any(t.is_floating_point() for t in others)
        most = 0 if others else max(proxy.numel() for proxy in found_proxies((args, kwargs)))
        return alone and all(self._samples not in t.shape or t.numel() <= most for t in results)

    def _settle(self) -> bool:
        """Decide every call from the two runs; False if something was treated otherwise than it should have been."""
        alone, together = self._seen[1], self._seen[2]
        self.plan.activations = 1
        right, unclear = alone.keys() == together.keys(), dict[Key, Unclear]()
        for key in alone.keys() & together.keys():
            try:
                self.plan.decisions[key] = decision = self._decided(key, alone[key], together[key])
            except Unclear as error:
                unclear[key] = error
            else:
                right = right and self._treated[key] == {decision == "derived"}
        # Two runs that went different ways may say of a call what is not so; unless they always will.
        before, self._before = self._before, (alone.keys(), together.keys(), self._treated)
        if right or before == self._before:
            for key, why in unclear.items():
                self._give_up({key: None}, f"{name_of(key[0])}: {why}")
        return right

    def _decided(self, key: Key, alone: list[Any], together: list[Any]) -> Decision:
        if len(alone) != len(together):
            shapes = {tuple(tensor.shape for tensor in results) for results, _ in (*alone, *together)}
            if not key[2] and len(shapes) == 1:  # no tensor takes part: samples do not, however often it is called
                return "derived"
            raise Unclear("it is called more often for more samples")
        found: set[Decision] = set()
        for (ones, given), (twos, given_too) in zip(alone, together, strict=True):
            for one, two in zip(ones, twos, strict=True):
                layout = layout_of(one.shape, two.shape)
                if layout is None:
                    found.add("derived")
                    continue
                if len(ones) > 1:
                    raise Unclear("it gives several batched tensors")
                self.plan.largest = max(self.plan.largest, one.numel(), *(t.numel() for t in given))
                self.plan.activations += one.numel()
                operands = list(zip(given, given_too, strict=True))
                found.add(_confirmed(layout, one, two, operands, self._alone))
        if len(found) != 1:
            raise Unclear("its results have the samples in different places")
        decision = found.pop()
        if (
            isinstance(decision, Layout)
            and (decision.dim or decision.merged == "minor")
            and rule_of(key[0]) is not None
        ):
            raise Unclear("its rule needs the samples in dimension 0, one after the other")
        return decision

    def _give_up(self, keys: dict[Key, Any], why: str) -> None:
        self.plan.unclear = True
        for key in keys:
            self._refuse([name for operand in key[1] for name in self._made_of[operand]], why)

    def _refuse(self, names: Sequence[str], why: str) -> None:
        for name in names:
            self.plan.given_up.setdefault(name, why)


def _counts_in_batch(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """True for a lookup whose gradient depends on the other samples' ids."""
    return func in (torch.embedding, torch.embedding_bag) and bool(
        kwargs.get("scale_grad_by_freq", args[3] if len(args) > 3 else False)
    )


def _confirmed(layout: Layout, one: Tensor, two: Tensor, given: Sequence[tuple[Tensor, Tensor]], index: int) -> Layout:
    """By the result's values or, where they say nothing, as with weights of 0, by those of an operand of its form."""
    try:
        return confirmed(layout, one, two, index)
    except Unclear:
        dim = layout.dim
        for before, after in given:
            if before.ndim == one.ndim and (before.shape[dim], after.shape[dim]) == (one.shape[dim], two.shape[dim]):
                return confirmed(layout, before, after, index)
        raise
