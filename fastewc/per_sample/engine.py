"""Σ_n |g_n|^p of whole batches: every use of every parameter is caught, and reduced instead of its weight gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastewc._dispatch import Impl
from fastewc.per_sample.batch_one import REENTRANT, Term, empty_gradients, graph_leaves, graph_nodes
from fastewc.per_sample.interception import Interception, Key
from fastewc.per_sample.made import taken_back
from fastewc.per_sample.plan import Plan, Planner
from fastewc.per_sample.proxy import Gate, Operand, Proxy, Slot, Slots, Tap, edge_of, found_proxies, tensors_in
from fastewc.per_sample.rules import RULES, Call, Use, rerun
from fastewc.per_sample.segments import Outer, Pulled, Rows, Segment, Sloped, Within, add_explicitly, add_tied, powers
from fastewc.per_sample.unrolled import Steps
from fastewc.per_sample.user_classes import intercepted
from fastewc.per_sample.user_rules import UserRule, class_rules, rule_of

#: Bytes that the largest activation of a part of a batch may have on a CPU: about what its caches hold, and what malloc
#: takes from pages that it has (glibc: up to 32 MB; fresh ones cost more than most kernels).
CACHED = 24 << 20
#: Bytes that it may have where small batches are joined.
JOINED = 4 << 20
#: Samples at a time where an op is differentiated once for each of them.
RERUN = 8


#: A gradient that has arrived at an operand.
Arrived = tuple[Operand, Segment]


class Unforeseen(Exception):
    """A call that the plan does not know: shapes or branches depend on the data. Nothing has been added."""


class PerSampleSums(Interception):
    """Sums Σ_n |∂value_n/∂w|^power over the samples of whole batches, float32 (float64 for float64 parameters).

    Args:
        module: the module whose parameters they are.
        parameters: the parameters to differentiate by, under their names.
        sums: the totals to add to, of the parameters' shapes.
        power: 2 for Fisher, 1 for MAS.
        impl: of the kernels.
        foreign: modules that are not in ``module`` may take part in the forward.

    Attributes:
        used: names of the parameters that a gradient has reached.
        paths: name -> ("fused" | "op", reason) of those that came through here.
        given_up: name -> why; these parameters are left out here, and have to go sample by sample.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        sums: Mapping[str, Tensor],
        power: int,
        impl: Impl,
        *,
        foreign: bool = False,
    ) -> None:
        super().__init__({id(p): name for name, p in parameters.items()})
        self.sums, self.used, self.paths = sums, set[str](), dict[str, tuple[str, str]]()
        self.given_up: dict[str, str] = {}
        self.terms, self.reached = 0, False
        self._module, self._power, self._impl, self._foreign = module, power, impl, foreign
        self._parameters = dict(parameters)
        self._gradients = sum(p.numel() for p in parameters.values())
        self._plan: Plan | None = None
        self._samples = 0
        self._gates: dict[str, Tensor] = {}
        self._leaves: list[Tensor] = []  # of the gates
        self._made: dict[str, int] = {}  # taps, by parameter
        self._waiting: dict[str, list[Arrived]] = {}
        self._back: dict[Operand, list[Arrived] | None] = {}  # by operand that arithmetic made, in one backward
        self._derived: list[Proxy] = []  # in this batch
        self._walked = self._at_end = self._reran = self._in_backward = False
        self._slots: Slots | None = None
        self._apart: dict[tuple[Any, ...], bool] = {}

    # ---- the plan ----

    @property
    def planned(self) -> bool:
        """True after :meth:`watch`."""
        return self._plan is not None

    def watch(self, run: Callable[[int, int], None]) -> None:
        """Find out how the model uses its parameters; see :meth:`Planner.watch`."""
        steps = Steps(alike=True)
        self._plan = self._planned(run, 0, steps)
        if self._plan.unclear:
            self._plan = min(self._plan, self._planned(run, 1, steps), key=lambda plan: len(plan.given_up))
        self._walked = False
        for name, why in self._plan.given_up.items():
            self.give_up(name, why)

    def _planned(self, run: Callable[[int, int], None], alone: int, steps: Steps) -> Plan:
        planner = Planner(self._names, alone)
        with intercepted(self._module, class_rules(), steps), self._stand_ins(planner).in_place():
            return planner.watch(run)

    def give_up(self, name: str, why: str) -> None:
        """Leave a parameter to others."""
        self.given_up.setdefault(name, why)
        self._slots = None

    def chunk(self) -> int:
        """How many samples to run at a time: results do not depend on it, speed does."""
        assert self._plan is not None
        if self._reran:
            return RERUN
        device = next(iter(self._parameters.values())).device
        return max(2, CACHED // (4 * self._plan.largest)) if device.type == "cpu" else 1 << 62

    def joined(self, batch: int) -> int:
        """How many samples to collect from batches of this size: memory stays that of a batch's forward and backward.

        A few megabytes of the largest activation, or as many activations as the gradients that are never made (what is
        kept for backward is about twice what the calls with parameters give).
        """
        assert self._plan is not None
        few, spared = JOINED // (4 * self._plan.largest), self._gradients // (2 * self._plan.activations)
        return min(self.chunk(), max(few, batch + spared))

    # ---- one batch ----

    def add(self, forward: Callable[[], Iterable[Term]], samples: int) -> None:
        """Add the terms, sums over ``samples`` samples whose gradients do not touch each other.

        Args:
            forward: runs the model and gives the terms one by one; a term's weight is 1.
            samples: N, in the places where the plan has found them.

        A parameter that a use escapes with is given up: nothing is added to its sum, now or ever after.

        Raises:
            Unforeseen: before anything was added.
            RuntimeError: a use escapes, or a checkpoint changes its mind, after something was added.
        """
        self._samples, self._gates, self._made, self._waiting, self._derived = samples, {}, {}, {}, []
        self._root = torch.zeros((), device=next(iter(self._parameters.values())).device, requires_grad=True)
        self._leaves = [self._root]
        self._slots = self._slots or self._stand_ins(self)
        with intercepted(self._module, class_rules(), Steps(alike=False)), self._slots.in_place() as slots:
            for term in forward():
                self.terms += 1
                if not term.value.requires_grad:
                    continue
                self.reached = self._in_backward = True
                try:
                    self._backward(term, slots)
                except Unforeseen as error:  # too late to begin anew: something has been added
                    raise RuntimeError(
                        "a checkpoint computes in backward what the forward did not. Use impl='reference', which takes "
                        "every sample by itself"
                    ) from error
                finally:
                    self._in_backward = False
        self._derived, self._back = [], {}  # a forward and its gradients stay no longer than that

    def _stand_ins(self, catcher: Interception) -> Slots:
        proxies: dict[int, Slot] = {}
        for name, p in self._parameters.items():
            if name in self.given_up:
                continue
            proxies[id(p)] = proxy = Slot.of(Operand.of(name, p), catcher)
            proxy.__dict__.update({k: v for k, v in p.__dict__.items() if k not in proxy.__dict__})
        return Slots(proxies, catcher, self._module, [p for p in self._parameters.values() if id(p) in proxies])

    def _backward(self, term: Term, slots: Slots) -> None:
        self._back = {}
        reached: list[Tensor] = []
        if not self._walked:  # before anything is added
            nodes = list(graph_nodes(term.value))
            reached = graph_leaves(nodes)
            self._escaped(reached)
            self._at_end = any(node.name() == REENTRANT for node in nodes)
            self._walked = True
        if self._at_end:
            with empty_gradients(self._module, [*reached, *slots.shown], foreign=self._foreign) as others:
                torch.autograd.backward(term.value, term.seed, retain_graph=term.keep_graph)
                self._escaped([leaf for leaf in (*others, *self._derived) if leaf.grad is not None])
            for name in list(self._waiting):
                self._finish(name)
            return
        known = set(self.given_up)
        shown = [*slots.shown, *self._derived]
        inputs = [*slots.edges, *map(edge_of, self._derived), *map(edge_of, self._leaves)]
        grads = torch.autograd.grad(
            term.value, inputs, grad_outputs=term.seed, retain_graph=term.keep_graph, allow_unused=True
        )
        late = self._escaped([t for t, grad in zip(shown, grads, strict=False) if grad is not None]) - known
        if late:
            raise RuntimeError(
                f"the model uses {', '.join(sorted(late))} in a batch as it did not in the batch before, in a way that "
                "no torch function shows (the parameter itself, or a custom Function). Use impl='reference', which "
                "takes every sample by itself, or exclude= these parameters"
            )

    def _escaped(self, leaves: Iterable[Tensor]) -> set[str]:
        """Parameters that torch would differentiate by itself: something used them behind our back."""
        names = self.names_of(leaves)
        for name in names - self.given_up.keys():
            self.give_up(name, "a use that no torch function shows: of the parameter itself, or in a custom Function")
        return names

    # ---- forward ----

    def made(self, proxy: Proxy) -> None:
        """Gradients that arrive there show what escaped us."""
        self._derived.append(proxy)

    def decide(self, key: Key, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """As planned; a batched call gets a tap on its result."""
        assert self._plan is not None
        if not torch.is_grad_enabled():  # autograd sees constants; a checkpoint runs it anew in backward
            return self.plainly(func, args, kwargs)
        decision = self._plan.decisions.get(key)
        if decision == "derived":
            others = tensors_in((args, kwargs))
            if any(_of_samples(tensor) for tensor in others) or self.names_behind(others):
                raise Unforeseen
            return self.derived(key, func, args, kwargs)
        if decision is None:
            result = self.plainly(func, args, kwargs)
            if not isinstance(result, Tensor) or result.is_floating_point():
                self._unknown(args, kwargs, result)
            return result
        whole = result = self.plainly(func, args, kwargs)
        index, own = None, rule_of(func)
        if isinstance(whole, tuple):  # the plan knows the only tensor in it that can have a gradient
            index = next(i for i, t in enumerate(whole) if isinstance(t, Tensor) and t.is_floating_point())
            result, func = whole[index], _part_of(func, index)
        if not decision.fits(result.shape, self._samples):
            raise Unforeseen
        call = Call(func, args, kwargs, result, decision, self._samples)
        uses = self._uses(call, own)
        call.forget()
        tapped = self._tapped(result, uses)
        return tapped if index is None else (*whole[:index], tapped, *whole[index + 1 :])

    def _unknown(self, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        names = {name for proxy in found_proxies((args, kwargs)) for name in proxy.operand.names}
        if any(t.is_floating_point() for t in tensors_in(result)) and names - self.given_up.keys():
            raise Unforeseen

    def _uses(self, call: Call, own: UserRule | None) -> list[Use]:
        rule = RULES.get(call.func) if own is None else own.uses
        uses = None if rule is None else rule(call)
        path = ("fused", "reduced in backward, instead of its gradient")
        if own is not None:
            path = ("fused", f"reduced in backward by your rule for {own.name}")
        if uses is None:
            uses, self._reran = rerun(call), True
            path = ("op", f"{getattr(call.func, '__name__', call.func)} is differentiated for each sample of a batch")
        for name in {name for use in uses for name in use.operand.names}:
            self._say(name, path)
        return uses

    def _say(self, name: str, path: tuple[str, str]) -> None:
        """How a parameter's importance comes about, for the report: the slowest of its ways."""
        if name not in self.paths or path[0] == "op":
            self.paths[name] = path

    def _tapped(self, result: Tensor, uses: list[Use]) -> Tensor:
        assert self._plan is not None
        names = dict.fromkeys(name for use in uses for name in use.operand.names)
        single = [name for name in names if self._plan.uses.get(name) == 1]
        gates = [self._gate(name) for name in names if name not in single] or [self._root]
        if not torch._C._current_graph_task_id() >= 0:  # not when a checkpoint runs it anew
            for name in names:
                self._made[name] = self._made.get(name, 0) + 1
                if name in single and self._made[name] > 1:
                    raise Unforeseen
        saved, places = list[Tensor](), list[list[int]]()
        for use in uses:
            places.append([])
            for tensor in use.saved:
                index = next((i for i, other in enumerate(saved) if other is tensor), len(saved))
                if index == len(saved):
                    saved.append(tensor)
                places[-1].append(index)

        kept = [(use.operand, use.segment, own) for use, own in zip(uses, places, strict=True)]  # not what they save

        def arrive(g: Tensor, *tensors: Tensor) -> None:
            if not self._in_backward:
                for name in names:
                    self.give_up(name, "the forward itself differentiates what it was used in")
                return
            for operand, make, own in kept:
                segment = make(g, *(tensors[i] for i in own))
                if segment is None:
                    continue
                for name in operand.names:
                    self._waiting.setdefault(name, []).append((operand, segment))
            for name in single:
                self._arrived(name)

        tapped: Tensor = Tap.apply(result, arrive, len(gates), *gates, *(t.detach() for t in saved))
        return tapped

    def _gate(self, name: str) -> Tensor:
        """Made at the first use, so that autograd comes to it right after the last of that use's followers."""
        if name not in self._gates:
            leaf = torch.zeros((), device=self._parameters[name].device, requires_grad=True)
            self._leaves.append(leaf)
            with torch.enable_grad():
                self._gates[name] = Gate.apply(leaf, lambda: self._arrived(name))
        return self._gates[name]

    # ---- backward ----

    def _arrived(self, name: str) -> None:
        if not self._at_end:
            self._finish(name)

    def _finish(self, name: str) -> None:
        """Reduce what has arrived for a parameter."""
        waiting = self._waiting.pop(name, [])
        if not waiting or name in self.given_up:
            return
        self.used.add(name)
        total, waiting = self.sums[name], self._taken_back(name, waiting)
        if len(waiting) == 1 and waiting[0][0].whole:
            segments = [waiting[0][1]]
            self._add_kinds(total, [segments], segments)
            return
        waiting = [_upright(*_of_table(*one), total) for one in waiting]
        groups: dict[tuple[Any, ...], list[Arrived]] = {}
        for operand, segment in waiting:
            groups.setdefault(_region(operand, total), []).append((operand, segment))
        if () in groups or not self._disjoint(total, groups):
            add_explicitly(total, [_whole_gradients(name, total, *one) for one in waiting], self._power)
            return
        for members in groups.values():
            view, slope = members[0][0].view, members[0][0].slope
            assert view is not None
            part, segments = view(total), [segment for _, segment in members]
            own = part if slope is None else torch.zeros_like(part)
            kinds = list[list[Segment]]()
            for segment in segments:
                kind = next((kind for kind in kinds if kind[0].joins(segment)), None)
                kinds.append([segment]) if kind is None else kind.append(segment)
            self._add_kinds(own, kinds, segments)
            if slope is not None:
                part.add_(own * powers(slope, self._power))

    def _taken_back(self, name: str, waiting: list[Arrived]) -> list[Arrived]:
        """With what arrived at something that arithmetic made as uses of the parameter itself, where that works."""
        found = [one for one in waiting if one[0].view is not None]
        made = dict[Operand, list[Segment]]()
        for operand, segment in waiting:
            if operand.view is None:
                made.setdefault(operand, []).append(segment)
        for operand, segments in made.items():
            if operand not in self._back:  # all of its uses have come, whichever of its parameters asks first
                self._back[operand] = taken_back(operand, segments)
            back = self._back[operand]
            if back is None:
                self._say(name, ("op", "made by arithmetic, differentiated for each sample"))
                found += [(operand, segment) for segment in segments]
            else:
                found += [one for one in back if name in one[0].names]
        return found

    def _add_kinds(self, part: Tensor, kinds: list[list[Segment]], segments: list[Segment]) -> None:
        """``part`` += Σ_n |Σ over segments|^power; ``kinds`` are the segments that one kernel call takes."""
        wide = torch.float64 if any(segment.double for segment in segments) else torch.float32
        total = part if part.dtype == wide else torch.zeros_like(part, dtype=wide)
        outers = [segment for segment in segments if isinstance(segment, Outer) and not segment.shape]
        rows = [segment for segment in segments if isinstance(segment, Rows)]
        if len(kinds) == 1:
            kinds[0][0].add_together(total, kinds[0], self._power, self._impl)
        elif len(kinds) == 2 and outers and rows and len(outers) + len(rows) == len(segments):
            add_tied(total, outers, rows, self._power, self._impl)
        else:
            add_explicitly(total, segments, self._power)
        if total is not part:
            part.add_(total)

    def _disjoint(self, total: Tensor, groups: Mapping[tuple[Any, ...], list[Arrived]]) -> bool:
        """True if no entry of the parameter is in two of its parts."""
        if len(groups) == 1:
            return True
        key = (tuple(total.shape), *sorted(repr(where) for *where, _ in groups))  # without the slope
        if key not in self._apart:
            counts = torch.zeros_like(total, dtype=torch.int32)
            for members in groups.values():
                view = members[0][0].view
                assert view is not None
                view(counts).add_(1)
            self._apart[key] = bool((counts <= 1).all())
        return self._apart[key]


def _part_of(func: Callable[..., Any], index: int) -> Callable[..., Any]:
    """The function that gives one of the results."""

    @functools.wraps(func)
    def part(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)[index]

    return part


def _of_samples(tensor: Tensor) -> bool:
    """True if a gradient that arrives at a tensor would go on to a use of a parameter with samples."""
    if not tensor.requires_grad or tensor.is_leaf:
        return False
    return any(node.name() == f"{Tap.__name__}Backward" for node in graph_nodes(tensor))


def _region(operand: Operand, total: Tensor) -> tuple[Any, ...]:
    """Which part of the parameter it is, with the order of its entries and their slope; () if arithmetic made it."""
    if operand.view is None:
        return ()
    part = operand.view(total)
    return (part.storage_offset(), tuple(part.shape), part.stride(), id(operand.slope))


def _of_table(operand: Operand, segment: Segment) -> tuple[Operand, Segment]:
    """Gradients at rows that were picked from a table, as those of the table."""
    picked = operand.picked
    if picked is None or operand.view is None:
        return operand, segment
    rows = Within(segment, operand.view, picked.rows).rows(0, segment.samples)
    ids = picked.ids.flatten()
    if picked.padding >= 0:
        ids = ids.masked_fill(ids == picked.padding, -1)
    table = picked.table
    return table, Rows(ids.expand(segment.samples, -1), rows.flatten(1, -2), table.value.shape[0])


def _upright(operand: Operand, segment: Segment, total: Tensor) -> tuple[Operand, Segment]:
    """Of a matrix and its transpose always the same one, so that uses of both come together."""
    view = operand.view
    if view is None or not isinstance(segment, Outer) or segment.shape:
        return operand, segment
    part = view(total)
    if part.ndim != 2 or part.stride(0) >= part.stride(1):
        return operand, segment
    return operand.moved(operand.key, lambda tensor: tensor.mT), segment.turned()


def _whole_gradients(name: str, total: Tensor, operand: Operand, segment: Segment) -> Segment:
    """A segment's gradients as those of the whole parameter."""
    if operand.view is not None:
        return Within(segment if operand.slope is None else Sloped(segment, operand.slope), operand.view, total)
    return Pulled(segment, operand.value, operand.leaves[name])
