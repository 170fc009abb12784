"""ewc_step in Triton: one launch for all tensors of a call that have the same lists and dtypes.

Letters as in ``reference.py``. For Adam a launch of a few programs goes before and advances the counters. What costs
no register is an argument, so there are few variants (:func:`specialisation`) and no schedule of α, λ or clipping
compiles anything. No autotuning: its trials would step. Products are not contracted into sums (``_tiles.options``), so
a step with Ω = 0 has the bits of a step without a penalty.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastewc.ops import _multi_tensor as multi
from fastewc.ops import _tiles
from fastewc.ops._parts import Dtypes, Part, parts
from fastewc.ops._tiles import (
    NARROW,
    aligned,
    locate,
    number,
    pointer,
    read,
    read_importance,
    read_whole,
    scalar,
    write,
    write_halves,
)
from fastewc.ops.ewc_penalty.triton import (
    divide,
    held_back,
    op_dtype,
    stiffness,
    stored_anchor,
    stored_importance,
)
from fastewc.ops.ewc_step import counters
from fastewc.ops.ewc_step.rule import StepRule, StepTensors
from fastewc.ops.ewc_step.schema import SCALARS, launches, scalars_of

COLUMNS = (
    "params", "grads", "momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "importances", "anchors",
    "remainders", "path_integrals", "steps", "scales",
)  # fmt: skip
# Their rows in the table.
PARAMS, GRADS, BUFFERS, EXP_AVGS, EXP_AVG_SQS, MAX_EXP_AVG_SQS, IMPORTANCES, ANCHORS, REMAINDERS, PATHS = map(
    tl.constexpr, range(1, 11)
)
SCALES = tl.constexpr(1 + COLUMNS.index("scales"))

#: Arguments of whose values (1, a multiple of 16) Triton would otherwise compile special kernels.
_VARYING = (
    "n", "chunk", "live", "clip_coef", "grad_scale", "found_inf", "stabilized", "maximize", "nesterov", "first",
    "decoupled", "clip_penalty", "regularized", "rounded",
)  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _lerp(a: tl.tensor, b: tl.tensor, k: tl.tensor) -> tl.tensor:
    """a + k(b − a), from the nearer end as torch.lerp does it."""
    return tl.where(k < 0.5, a + k * (b - a), b - (1 - k) * (b - a))


@triton.jit  # type: ignore[untyped-decorator]
def _root(x: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    if EXACT and x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit  # type: ignore[untyped-decorator]
def _step_tile(
    ptrs: tl.tensor,
    scalars: tl.tensor,
    at: tl.tensor,
    left: tl.tensor,
    KIND: tl.constexpr,
    HELD: tl.constexpr,
    TRACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    OP: tl.constexpr,
    EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """The statements of ``reference.ewc_step``, in their order, on elements at … at + left."""
    (
        param_ptr, grad_ptr, buffer_ptr, m_ptr, v_ptr, largest_ptr, omega_ptr, anchor_ptr, low_ptr, path_ptr,
        scales_ptr, begin,
    ) = ptrs  # fmt: skip
    (
        lr, pull_lr, ewc_lambda, s_of_omega, unscale, gain, pull_kappa, coupled, shrink, momentum, undamped, eps,
        beta2, new1, new2, step_size, root2, first, nesterov, regularized, rounded,
    ) = scalars  # fmt: skip
    # All loads before the first store: none of them can move up past it.
    if SPLIT:
        w = read_whole(param_ptr, low_ptr, at, left, WIDTH, VECTOR)
    else:
        w = read(param_ptr, at, left, OP, WIDTH, VECTOR)
    grad = read(grad_ptr, at, left, OP, WIDTH, VECTOR)
    if HELD != "free":
        omega = read_importance(omega_ptr, scales_ptr, begin, at, left, OP, WIDTH, VECTOR)
    if HELD == "pulled" or HELD == "proximal":
        anchor = read(anchor_ptr, at, left, OP, WIDTH, VECTOR)
    if KIND == "momentum":
        b = read(buffer_ptr, at, left, OP, WIDTH, VECTOR)
    elif KIND != "sgd":
        m = read(m_ptr, at, left, OP, WIDTH, VECTOR)
        v = read(v_ptr, at, left, OP, WIDTH, VECTOR)
    if KIND == "amsgrad":
        largest = read(largest_ptr, at, left, OP, WIDTH, VECTOR)
    if TRACKED:
        path = read(path_ptr, at, left, OP, WIDTH, VECTOR)

    g, g_path = gain * grad, unscale * grad
    if HELD == "pulled":
        pull = stiffness(omega, ewc_lambda, pull_lr, EXACT) * (w - anchor)
        g += pull_kappa * pull
        g_path = tl.where(regularized, g_path + pull, g_path)
    g = tl.where(coupled != 0, g + coupled * w, g)
    if KIND == "sgd":
        w_new = w - lr * g
    elif KIND == "momentum":
        b = tl.where(first, g, momentum * b + undamped * g)
        write(buffer_ptr, at, left, b, WIDTH, VECTOR)
        w_new = w - lr * tl.where(nesterov, g + momentum * b, b)
    else:
        m = _lerp(m, g, new1)
        v = beta2 * v + new2 * (g * g)
        write(m_ptr, at, left, m, WIDTH, VECTOR)
        write(v_ptr, at, left, v, WIDTH, VECTOR)
        if KIND == "amsgrad":
            v = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
            write(largest_ptr, at, left, v, WIDTH, VECTOR)
        w_new = shrink * w - step_size * divide(m, divide(_root(v, EXACT), root2, EXACT) + eps, EXACT)
    if HELD == "proximal":
        w_new = held_back(w_new, anchor, s_of_omega * omega, EXACT)
    elif HELD == "wva":
        w_new = held_back(w_new, w, s_of_omega * omega, EXACT)
    stored = w_new if SPLIT else w_new.to(param_ptr.dtype.element_ty)
    if TRACKED:
        if stored.dtype == tl.float32 and not SPLIT:  # it may stand in for a 16-bit parameter
            stored = tl.where(rounded == 1, stored.to(tl.bfloat16).to(tl.float32), stored)
            stored = tl.where(rounded == 2, stored.to(tl.float16).to(tl.float32), stored)
        write(path_ptr, at, left, path - g_path * (stored.to(OP) - w), WIDTH, VECTOR)
    if SPLIT:
        write_halves(param_ptr, low_ptr, at, left, stored, WIDTH, VECTOR)
    else:
        write(param_ptr, at, left, stored, WIDTH, VECTOR)


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _step(
    table_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    corrections_ptr: tl.tensor,
    n: tl.int64,
    chunk: tl.int64,
    lr: tl.float64,
    ewc_lambda: tl.float64,
    weight_decay: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    momentum: tl.float64,
    dampening: tl.float64,
    live: tl.int64,
    clip_coef: tl.int64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    stabilized: tl.int32,
    maximize: tl.int32,
    nesterov: tl.int32,
    first: tl.int32,
    decoupled: tl.int32,
    clip_penalty: tl.int32,
    regularized: tl.int32,
    rounded: tl.int32,
    KIND: tl.constexpr,
    HELD: tl.constexpr,
    TRACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    ANCHOR: tl.constexpr,
    OMEGA: tl.constexpr,
    OP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One chunk of one tensor. Scalars are formed in float64, from the arguments or the numbers at ``live``."""
    row, begin, count = locate(table_ptr, blocks_ptr, chunk)
    count = tl.where(scalar(found_inf, 0.0, tl.float32) != 0, 0, count)
    ptrs = (
        pointer(table_ptr, n, row, begin, PARAMS, PARAM),
        pointer(table_ptr, n, row, begin, GRADS, GRAD),
        pointer(table_ptr, n, row, begin, BUFFERS, MOMENT),
        pointer(table_ptr, n, row, begin, EXP_AVGS, MOMENT),
        pointer(table_ptr, n, row, begin, EXP_AVG_SQS, MOMENT),
        pointer(table_ptr, n, row, begin, MAX_EXP_AVG_SQS, MOMENT),
        pointer(table_ptr, n, row, begin, IMPORTANCES, OMEGA),
        pointer(table_ptr, n, row, begin, ANCHORS, ANCHOR),
        pointer(table_ptr, n, row, begin, REMAINDERS, tl.int16),
        pointer(table_ptr, n, row, begin, PATHS, OP),
        pointer(table_ptr, n, row, 0, SCALES, tl.float32),
        begin,
    )
    lr, ewc_lambda = number(live, 0, lr), number(live, 1, ewc_lambda)
    weight_decay = number(live, 2, weight_decay)
    beta1, beta2 = number(live, 3, beta1), number(live, 4, beta2)
    kappa = scalar(clip_coef, 1.0, OP)
    unscale = (1.0 / scalar(grad_scale, 1.0, tl.float32).to(tl.float64)).to(tl.float32).to(OP)
    unscale = tl.where(maximize != 0, -unscale, unscale)
    step_size, root2 = 0.0, 1.0
    if KIND == "adam" or KIND == "amsgrad":
        step_size = tl.load(corrections_ptr + row).to(OP)
        root2 = tl.load(corrections_ptr + n + row).to(OP)
    scalars = (
        lr.to(OP),
        tl.where(stabilized != 0, lr, 0.0).to(OP),
        ewc_lambda.to(OP),
        (ewc_lambda * lr).to(OP),
        unscale,
        unscale * kappa,
        tl.where(clip_penalty != 0, kappa, 1.0),
        tl.where(decoupled != 0, 0.0, weight_decay).to(OP),
        tl.where(decoupled != 0, 1 - lr * weight_decay, 1.0).to(OP),
        number(live, 6, momentum).to(OP),
        (1 - number(live, 7, dampening)).to(OP),
        number(live, 5, eps).to(OP),
        beta2.to(OP),
        (1 - beta1).to(OP),
        (1 - beta2).to(OP),
        step_size,
        root2,
        first != 0,
        nesterov != 0,
        regularized != 0,
        rounded,
    )
    vectors = aligned(table_ptr, n, row, PATHS)
    for at in range(0, count, BLOCK):
        left = tl.minimum(count - at, BLOCK)
        whole = tl.where(vectors, left, 0) // 16 * 16
        _step_tile(ptrs, scalars, at, whole, KIND, HELD, TRACKED, SPLIT, OP, EXACT, BLOCK, True)
        for rest in range(at + whole, at + left, NARROW):
            _step_tile(ptrs, scalars, rest, at + left - rest, KIND, HELD, TRACKED, SPLIT, OP, EXACT, NARROW, False)


_FRESH = (COLUMNS.index("grads"),)
_OMEGAS, _SCALES = COLUMNS.index("importances"), COLUMNS.index("scales")
_WRITTEN = tuple(name not in ("grads", "importances", "anchors", "scales") for name in COLUMNS)
_MOMENTS = ("momentum_buffers", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
#: How a float32 tensor that stands in for a 16-bit parameter is rounded before E7 looks at it.
_ROUNDED: dict[torch.dtype | None, int] = {torch.bfloat16: 1, torch.float16: 2}


def specialisation(
    rule: StepRule,
    *,
    held: bool,
    tracked: bool,
    param: torch.dtype,
    anchor: torch.dtype,
    omega: torch.dtype | None = None,
    grad: torch.dtype | None = None,
    moment: torch.dtype | None = None,
    split: bool = False,
) -> dict[str, Any]:
    """The compile-time arguments of a launch; two calls that give the same ones run the same kernel.

    float32 results are rounded to nearest after every operation. Of 16-bit ones the storage hides 2 ulp of float32,
    so quotients and roots take the fast instructions. ``grad`` and ``moment`` are the parameter's unless given.
    """
    op = op_dtype(param)
    kinds = {"sgd": "momentum" if rule.momentum != 0 else "sgd", "adam": "amsgrad" if rule.amsgrad else "adam"}
    ways = {"plain": "pulled", "stabilized": "pulled", "proximal": "proximal", "wva": "wva"}
    read_anchor = anchor if held and rule.variant != "wva" else param
    omega, grad = omega or op, grad or param
    kind = kinds[rule.kind]
    moment = param if moment is None or kind == "sgd" else moment
    size = attrgetter("itemsize")
    narrowest = min(param, read_anchor, *([omega] if held else []), key=size)
    widest = max(param, moment, op if tracked else param, key=size)
    return {
        "KIND": kind,
        "HELD": ways[rule.variant] if held else "free",
        "TRACKED": tracked,
        "SPLIT": split,
        "PARAM": _tiles.ELEMENTS[param],
        "GRAD": _tiles.ELEMENTS[grad],
        "MOMENT": _tiles.ELEMENTS[moment],
        "ANCHOR": _tiles.ELEMENTS[read_anchor],
        "OMEGA": _tiles.ELEMENTS[omega],
        "OP": _tiles.ELEMENTS[op],
        "EXACT": split or op == param,
        "BLOCK": _tiles.tile_width(op, narrowest, written=widest),
    }


def ewc_step(
    rule: StepRule,
    tensors: StepTensors,
    *,
    clip_coef: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Step all tensors: a launch (Adam: two) for each set of lists and dtypes; nothing waits for the device."""
    device = tensors.params[0].device
    numbers, live = scalars_of(rule, device)
    grad_scale, found_inf = (None if x is None else x.to(device, torch.float32) for x in (grad_scale, found_inf))
    with multi.on_device(device):
        for launch in launches(rule, tensors):
            lists = [getattr(launch.tensors, name, []) for name in COLUMNS]
            lists[_OMEGAS], lists[_SCALES] = _tiles.with_codes(launch.tensors.params, lists[_OMEGAS])
            for part in parts(lists, fresh=_FRESH, wanted=_kernel_dtypes, written=_WRITTEN, aside=(_SCALES,)):
                op = op_dtype(part.dtypes[0])
                kappa = None if clip_coef is None else clip_coef.to(device, op)
                _launch(rule, launch.first, part, numbers or [0.0] * len(SCALARS), (live, kappa, grad_scale, found_inf))
                part.copy_back(found_inf)


@lru_cache
def _kernel_dtypes(own: Dtypes) -> Dtypes:
    """What the kernel takes: moments and gradients like the parameter, Ω and ω like the arithmetic.

    Moments of bfloat16 parameters may be float32, and with remainders their gradients too. Where moments or gradients
    have another dtype of their own, all of them go through tensors of the arithmetic's, and so do parameters without
    remainders.
    """
    kinds = dict(zip(COLUMNS, own, strict=True))
    param, grad, split = kinds["params"], kinds["grads"], kinds["remainders"] is not None
    moments = {kinds[name] for name in _MOMENTS} - {None}
    wide = param == torch.bfloat16 and moments == {torch.float32}
    alike = grad == param and (moments <= {param} or wide)
    stored = param if alike or split else op_dtype(param)
    if not alike:
        grad = moment = op_dtype(param)
    else:
        moment = torch.float32 if wide else param
    step = torch.float64 if kinds["steps"] == torch.float64 else torch.float32
    omega = stored_importance(stored, kinds["importances"])
    others = {"importances": omega, "path_integrals": op_dtype(param), "steps": step, "scales": torch.float32}
    if kinds["anchors"] is not None:
        others["anchors"] = stored_anchor(stored, kinds["anchors"])
    wanted = {"params": stored, "grads": grad, "remainders": torch.int16} | dict.fromkeys(_MOMENTS, moment) | others
    return tuple(kind and wanted[name] for name, kind in kinds.items())


def _launch(rule: StepRule, first: bool, part: Part, numbers: list[float], scalars: tuple[Tensor | None, ...]) -> None:
    """What is compiled in is what ``specialisation`` says; everything else may change from step to step."""
    kinds = dict(zip(COLUMNS, part.dtypes, strict=True))
    param, anchor, step = kinds["params"], kinds["anchors"], kinds["steps"]
    constants = specialisation(
        rule, held=anchor is not None, tracked=kinds["path_integrals"] is not None, param=param, anchor=anchor or param,
        omega=kinds["importances"], grad=kinds["grads"], moment=kinds["momentum_buffers"] or kinds["exp_avgs"],
        split=kinds["remainders"] is not None,
    )  # fmt: skip
    table = multi.table("ewc_step", part, constants["BLOCK"], scratch=_corrections)
    options = _tiles.options(op_dtype(param))
    live, *others = map(multi.address, scalars)
    if rule.kind == "adam":
        lr, _, _, beta1, beta2, *_ = numbers
        counters.advance[(triton.cdiv(table.n, counters.COUNTERS.value),)](
            table.rows, table.scratch, table.n, lr, beta1, beta2, live, others[-1],
            **counters.specialisation(step, param), **options,
        )  # fmt: skip
    if table.programs:
        _step[(table.programs,)](
            table.rows, table.blocks, table.scratch, table.n, table.chunk, *numbers, live, *others,
            int(rule.variant == "stabilized"), int(rule.maximize), int(rule.nesterov), int(first),
            int(rule.decoupled_weight_decay), int(rule.clip_penalty), int(rule.regularized_path),
            _ROUNDED.get(part.own[0], 0), **constants, **options,
        )  # fmt: skip


def _corrections(n: int, programs: int, device: torch.device) -> Tensor:
    """Adam's α/(1 − β₁ᵗ) and √(1 − β₂ᵗ) of each tensor, [2, n]."""
    return torch.empty(2, n, dtype=torch.float64, device=device)
