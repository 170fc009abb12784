"""Steps whose tensors have any shape, layout and mix of dtypes, checked against the float64 reference.

Bounds are those of ``cases.py``, counted in roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from fastewc._dispatch import IMPLS, Chosen, choose
from fastewc.ops.ewc_step import StepRule, StepTensors, reference
from fastewc.ops.ewc_step.cases import Case, columns, converted
from fastewc.testing import assert_within_roundings, op_dtype

LAYOUTS = ("contiguous", "channels_last", "transposed", "gaps", "misaligned")


def implementations(device: str) -> Iterator[Chosen]:
    """Every implementation that runs here."""
    for impl in IMPLS:
        try:
            yield choose("ewc_step", impl, torch.device(device))
        except NotImplementedError:
            continue


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another place and order in memory."""
    shape, dims = values.shape, values.ndim
    match layout:
        case "channels_last" if dims > 2:  # of any number of dimensions
            order = [0, *range(2, dims), 1]
        case "transposed":
            order = [*reversed(range(dims))]
        case "gaps":
            return values.new_full((*shape, 2), 7.0)[..., 1].copy_(values)
        case "misaligned":
            return values.new_full((values.numel() + 1,), 7.0)[1:].view(shape).copy_(values)
        case "expanded" if values.numel():
            return values.flatten()[0].expand(shape)
        case _:
            return values.clone(memory_format=torch.contiguous_format)
    back = [order.index(d) for d in range(dims)]
    return values.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def memory(t: Tensor) -> Tensor:
    """All that the storage of a tensor holds, as one vector."""
    return torch.as_strided(t, (t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)


def copied(t: Tensor | None, device: str) -> Tensor | None:
    """A copy with all its storage and the same layout."""
    return None if t is None else memory(t).to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def outside(t: Tensor) -> Tensor:
    """What the storage holds beside the elements of a tensor."""
    mask = torch.ones_like(memory(t), dtype=torch.bool)
    mask.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return memory(t)[mask]


@dataclass(frozen=True)
class Drawn(Case):
    """A case whose tensors are given, each of its own dtype and layout."""

    tensors: StepTensors = field(default_factory=StepTensors)

    def inputs(self, dtype: torch.dtype | None = None, device: str = "cpu") -> StepTensors:
        lists = {name: [copied(t, device) for t in entries] for name, entries in vars(self.tensors).items()}
        return StepTensors(**lists)

    def check(self, device: str) -> None:
        """Step with every implementation; compare what it wrote, and that it wrote nothing else."""
        oracle = self.oracle(torch.float64)
        scales = {dtype: self.error_scale(dtype) for dtype in {p.dtype for p in self.tensors.params}}
        for impl in implementations(device):
            before, after = self.inputs(device=device), self.inputs(device=device)
            self.step(after, impl)
            for k, (name, i, tensor) in enumerate(columns(after)):
                dtype = after.params[i].dtype
                assert_within_roundings(
                    tensor, oracle[k], roundings=self.roundings, error_scale=scales[dtype][k], dtype=op_dtype(dtype),
                    context=f"{impl} {name}[{i}] {tuple(tensor.shape)} {tensor.dtype} of {dtype}:",
                )  # fmt: skip
            self._check_path_integrals(before, after, impl)
            for name in (f.name for f in fields(StepTensors)):
                for old, new in zip(getattr(before, name), getattr(after, name), strict=True):
                    if old is not None:
                        keeps = outside if name not in ("grads", "importances", "anchors") else memory
                        assert torch.equal(keeps(old), keeps(new)), f"{impl} wrote into {name} where it must not"

    def _check_path_integrals(self, before: StepTensors, after: StepTensors, impl: str) -> None:
        """E7 with w⁺ as it was stored: to a few roundings of float32, also where w has only eight bits."""
        old, new = converted(before, torch.float64), converted(after, torch.float64)
        grad_scale = None if self.grad_scale is None else torch.tensor(self.grad_scale)
        for i, path in enumerate(old.path_integrals):
            if path is None:
                continue
            w, move = old.params[i], new.params[i] - old.params[i]
            task = reference.task_gradient(old.grads[i], torch.float64, grad_scale, maximize=self.rule.maximize)
            pull = reference.penalty_gradient(self.rule, old, i, w) if self.rule.regularized_path else None
            pull = torch.zeros_like(w) if pull is None else pull
            assert_within_roundings(
                after.path_integrals[i], path - (task + pull) * move, roundings=self.roundings,
                error_scale=path.abs() + (task.abs() + pull.abs()) * move.abs(), context=f"{impl} path_integrals[{i}]:",
            )  # fmt: skip


def drawn_case(
    rule: StepRule,
    params: list[Tensor],
    gen: torch.Generator,
    *,
    layouts: Callable[[int, str], str] = lambda i, name: "contiguous",
    dtypes: Callable[[int, str, torch.dtype], torch.dtype] = lambda i, name, own: own,
    protected: Callable[[int], bool] = lambda i: True,
    tracked: Callable[[int], bool] = lambda i: True,
    fresh: Callable[[int], bool] = lambda i: False,
    clip_coef: float | None = None,
    grad_scale: float | None = None,
) -> Drawn:
    """Everything that belongs to the parameters, with the values of ``cases.py``; Ω spans eleven decades."""
    t = StepTensors()
    for i, p in enumerate(params):
        wide = op_dtype(p.dtype)

        def place(name: str, values: Tensor, i: int = i) -> Tensor:
            return laid_out(values, layouts(i, name))

        def normal(name: str, times: float = 1.0, i: int = i, p: Tensor = p) -> Tensor:
            return (times * torch.randn(p.shape, generator=gen, dtype=torch.float64)).to(dtypes(i, name, p.dtype))

        t.params.append(place("params", p))
        t.grads.append(place("grads", normal("grads", grad_scale or 1.0)))
        held = protected(i)
        omega = 10 ** (11 * torch.rand(p.shape, generator=gen, dtype=torch.float64) - 9)
        omega.view(-1)[::5] = 0
        # In digits of the arithmetic: rounded to it later, w − w* would lose more than its own roundings.
        anchor = (p.double() + 0.1 * normal("anchors").double()).to(wide).to(dtypes(i, "anchors", p.dtype))
        t.importances.append(place("importances", omega.to(wide)) if held else None)
        t.anchors.append(place("anchors", anchor) if held else None)
        t.path_integrals.append(place("path_integrals", normal("", 1.0).to(wide)) if tracked(i) else None)
        if rule.kind == "adam":
            t.exp_avgs.append(place("exp_avgs", normal("exp_avgs")))
            t.exp_avg_sqs.append(place("exp_avg_sqs", normal("exp_avg_sqs").square()))
            t.steps.append(torch.tensor(float(3 + i % 5)))
            if rule.amsgrad:
                t.max_exp_avg_sqs.append(place("max_exp_avg_sqs", normal("max_exp_avg_sqs").square()))
        elif rule.momentum != 0:
            t.momentum_buffers.append(None if fresh(i) else place("momentum_buffers", normal("momentum_buffers")))
    return Drawn("drawn", rule, clip_coef, grad_scale, tensors=t)
