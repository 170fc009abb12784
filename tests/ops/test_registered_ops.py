"""The registered ops as torch sees them: schemas and fakes (opcheck), torch.compile, autograd's version counters."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastewc import _dispatch
from fastewc.ops.ewc_penalty import cases as penalty_cases
from fastewc.ops.ewc_penalty import ewc_hold_back_, ewc_penalty
from fastewc.ops.ewc_step import StepRule, StepTensors, ewc_step
from fastewc.ops.ewc_step import cases as step_cases
from fastewc.ops.ewc_step.schema import launches, scalars_of
from fastewc.ops.importance_codes import split

CHECKED = (
    "momentum-stabilized",
    "sgd-tensor-lr",
    "dampening-first",
    "adam-amsgrad",
    "adamw-proximal",
    "adamw-clip-scale",
    "adamw-split",
    "momentum-first-split",
)
STEPS = [case for case in step_cases.CASES if case.id in CHECKED]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def native_library():
    try:
        _dispatch.choose("ewc_step", "native", CPU)
    except NotImplementedError as error:
        pytest.skip(str(error))


def arguments(case: step_cases.Case, tensors: StepTensors) -> list[tuple[Any, ...]]:
    """What native.ewc_step passes to the op, one tuple per launch."""
    rule = case.rule
    numbers, live = scalars_of(rule, CPU)
    clip, scale = (None if x is None else torch.tensor(x) for x in (case.clip_coef, case.grad_scale))
    return [
        (
            t.params, t.grads, t.momentum_buffers, t.exp_avgs, t.exp_avg_sqs, t.max_exp_avg_sqs, t.steps,
            *split(t.importances), t.anchors, t.path_integrals, t.remainders, clip, scale, None, live, numbers,
            rule.kind, rule.variant, rule.maximize, rule.nesterov, launch.first, rule.amsgrad,
            rule.decoupled_weight_decay, rule.clip_penalty, rule.regularized_path,
        )
        for launch in launches(rule, tensors)
        for t in [launch.tensors]
    ]  # fmt: skip


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)
def test_opcheck_of_ewc_step(case: step_cases.Case):
    from fastewc.ops.ewc_step import native  # noqa: F401  # defines the op

    for args in arguments(case, case.inputs(case.dtypes[0])):
        torch.library.opcheck(torch.ops.fastewc.ewc_step.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_penalty_ops(dtype: torch.dtype):
    from fastewc.ops.ewc_penalty import native  # noqa: F401  # defines the ops

    ops = torch.ops.fastewc
    params, importances, anchors = penalty_cases.CASES[-1].make_inputs(dtype)
    lrs, live = [0.1] * len(params), torch.full((len(params),), 0.1, dtype=torch.float64)
    held = (params, importances, [], anchors)
    torch.library.opcheck(ops.ewc_penalty_value.default, (*held, 3.0, lrs, None, "stabilized"))
    torch.library.opcheck(ops.ewc_penalty_value.default, (*held, 3.0, [], live, "plain"))
    torch.library.opcheck(ops.ewc_penalty_grads.default, (*held, [], 3.0, lrs, None, "plain", False, None))
    grads = [torch.randn(p.shape).to(dtype) for p in params]
    scale = torch.tensor(4.0)
    torch.library.opcheck(ops.ewc_penalty_grads.default, (*held, grads, 3.0, lrs, None, "stabilized", True, scale))
    torch.library.opcheck(ops.ewc_hold_back_.default, (params, anchors, importances, [], 3.0, lrs, None, None))
    torch.library.opcheck(ops.ewc_stats_terms.default, (*held, 3.0, lrs, None, "plain"))


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)
def test_a_compiled_step_is_one_graph_with_the_same_bits(case: step_cases.Case):
    eager, compiled = case.inputs(case.dtypes[0]), case.inputs(case.dtypes[0])
    clip, scale = (None if x is None else torch.tensor(x) for x in (case.clip_coef, case.grad_scale))

    def step(tensors: StepTensors) -> None:
        ewc_step(case.rule, tensors, clip_coef=clip, grad_scale=scale)

    torch._dynamo.reset()
    torch.compile(step, fullgraph=True)(compiled)
    step(eager)
    for (name, i, got), (_, _, wanted) in zip(step_cases.columns(compiled), step_cases.columns(eager), strict=True):
        assert torch.equal(got, wanted), f"{name}[{i}]"


def test_a_compiled_penalty_has_the_same_value_and_gradient():
    params, importances, anchors = penalty_cases.CASES[-1].make_inputs(torch.float32)
    params = [p.requires_grad_() for p in params]

    def penalty() -> Tensor:
        return ewc_penalty(params, importances, anchors, ewc_lambda=3.0, lrs=[0.1] * len(params), variant="stabilized")

    torch._dynamo.reset()
    compiled = torch.compile(penalty)
    assert torch.equal(compiled(), penalty())
    got, wanted = torch.autograd.grad(compiled(), params), torch.autograd.grad(penalty(), params)
    assert all(map(torch.equal, got, wanted))


def test_a_backward_through_stepped_weights_raises():
    w = torch.randn(5, requires_grad=True)
    loss = (w * w).sum()  # saves w
    with torch.no_grad():
        ewc_step(StepRule("sgd", lr=0.1), StepTensors([w], [torch.ones(5)]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    w = torch.randn(5, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        ewc_hold_back_([w], [torch.ones(5)], [torch.ones(5)], ewc_lambda=1.0, lrs=[0.1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_op_itself_refuses_what_does_not_fit():
    case = next(case for case in STEPS if case.id == "adam-amsgrad")
    (args, *_) = arguments(case, case.inputs(torch.float32))
    op = torch.ops.fastewc.ewc_step.default
    for place, wrong, text in (
        (0, [torch.ones(2, dtype=torch.int32)] * len(args[0]), "float"),
        (1, args[1][:-1], "lists of"),
        (1, [torch.ones(3)] * len(args[0]), "shape"),
        (8, [torch.ones(1)], "lists of"),
        (11, [torch.zeros_like(p, dtype=torch.int16) for p in args[0]], "int16 remainders of bfloat16 parameters"),
        (16, [1.0], "8 scalars"),
        (17, "lion", "sgd"),
        (18, "elastic", "variant"),
    ):
        before = [t.clone() for t in (*args[0], *args[6])]  # parameters and counters
        with pytest.raises(RuntimeError, match=text):
            op(*args[:place], wrong, *args[place + 1 :])
        assert all(map(torch.equal, before, (*args[0], *args[6])))


def test_rules_hold_their_scalars():
    rule = StepRule("adam", lr=0.5, betas=(0.25, 0.75), eps=2.0, weight_decay=3.0, ewc_lambda=4.0)
    assert rule.numbers == [0.5, 4.0, 3.0, 0.25, 0.75, 2.0, 0.0, 0.0]
    live = dataclasses.replace(rule, lr=torch.tensor(0.5))
    assert live.numbers is None
    numbers, tensor = scalars_of(live, CPU)
    assert numbers == [] and tensor is not None and tensor.tolist() == rule.numbers
