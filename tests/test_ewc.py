"""The EWC object: options, folding tasks, penalty and statistics; hand-worked numbers and literal sums."""

import copy

import pytest
import torch
from torch import nn

from fastewc import EWC, Importance
from fastewc.optim import SGD
from fastewc.testing import assert_within_roundings
from tests.helpers import importance_of, move, net, weights

GOOD = {"ewc_lambda": 2.0}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"ewc_lambda": -1.0}, ValueError, "ewc_lambda must be finite and >= 0, got -1.0"),
        ({"ewc_lambda": float("nan")}, ValueError, "ewc_lambda"),
        ({"ewc_lambda": float("inf")}, ValueError, "ewc_lambda"),
        (
            {"variant": "stable"},
            ValueError,
            "variant must be one of plain, stabilized, proximal, wva, got 'stable'",
        ),
        ({"anchor": "first"}, ValueError, "anchor must be one of latest, weighted"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\]"),
        ({"importance_dtype": torch.float16}, ValueError, "importance_dtype must be"),
        ({"importance_dtype": torch.int32}, ValueError, "importance_dtype must be"),
        ({"anchor_dtype": torch.float16}, ValueError, "anchor_dtype must be"),
        ({"exclude": "*"}, ValueError, "no parameter to protect"),
        ({"exclude": [3]}, TypeError, "fnmatch patterns"),
    ],
)
def test_bad_options(arguments, error, text):
    with pytest.raises(error, match=text):
        EWC(net(), **(GOOD | arguments))


def test_lambda_is_required_and_may_change():
    with pytest.raises(TypeError, match="ewc_lambda"):
        EWC(net())
    ewc = EWC(net(), ewc_lambda=0)
    ewc.ewc_lambda = 40.0
    assert ewc.ewc_lambda == 40.0
    with pytest.raises(ValueError, match="-1"):
        ewc.ewc_lambda = -1
    assert ewc.ewc_lambda == 40.0


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        EWC([], ewc_lambda=1.0)


def test_batch_norm_statistics_are_pointed_out_once():
    with pytest.warns(UserWarning, match="1 BatchNorm layers: their running statistics") as caught:
        EWC(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), ewc_lambda=1.0)
    assert len(caught) == 1


def test_before_the_first_task():
    model = net()
    ewc = EWC(model, ewc_lambda=5.0)
    assert ewc.num_tasks == 0
    value = ewc.penalty(lr=0.1)
    value.backward()
    assert value.item() == 0 and all(p.grad is None for p in model.parameters())
    assert all(not t.any() for t in ewc.importances().values()) and ewc.importances().num_samples == 0
    assert all(torch.equal(ewc.anchors()[n], p) for n, p in model.named_parameters())
    assert ewc.stats(0.1) == dict.fromkeys(("penalty", "max", "q50", "q90", "q99", "share_above_1", "rms_drift"), 0.0)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_latest_anchor_sums_importances(gamma):
    model = net()
    ewc = EWC(model, ewc_lambda=2.0, gamma=gamma, variant="plain")
    total = None
    for task in range(3):
        move(model, task)
        imp = importance_of(model, seed=task)
        ewc.consolidate(imp)
        total = {n: t.double() + (gamma * total[n] if total else 0) for n, t in imp.items()}
        assert all(torch.equal(a, p) for a, p in zip(ewc.anchors().values(), model.parameters(), strict=True))
    assert ewc.num_tasks == 3 and ewc.importances().num_samples == 30 and ewc.importances().method == "test"
    for name, omega in ewc.importances().items():
        assert_within_roundings(omega, total[name], roundings=6)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_weighted_anchor_is_the_literal_sum_over_tasks(gamma):
    """E10: the gradient of Σ_k γ^(K−k) (λ/2) Ω_k(w − w_k)² is λΩ̄(w − μ), and differences of the values agree."""
    model = net().double()
    ewc = EWC(model, ewc_lambda=3.0, gamma=gamma, anchor="weighted", variant="plain")
    tasks = []
    for task in range(4):
        move(model, task)
        imp = importance_of(model, seed=task)
        if task == 1:
            next(iter(imp.values()))[0] = 0  # some weights matter for later tasks only
        ewc.consolidate(imp)
        tasks.append(({n: t.double() for n, t in imp.items()}, weights(model)))

    def literal() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k, (omega, at) in enumerate(tasks):
            for n, p in model.named_parameters():
                total = total + gamma ** (len(tasks) - 1 - k) * 1.5 * (omega[n] * (p - at[n]) ** 2).sum()
        return total

    def both() -> list[tuple[float, list[torch.Tensor]]]:
        return [(v.item(), list(torch.autograd.grad(v, model.parameters()))) for v in (ewc.penalty(), literal())]

    (ours, our_grads), (wanted, wanted_grads) = both()
    for got, grad in zip(our_grads, wanted_grads, strict=True):
        assert_within_roundings(got, grad, roundings=64, error_scale=grad.abs() + 10)
    move(model, 99)
    (ours2, _), (wanted2, _) = both()
    assert ours2 - ours == pytest.approx(wanted2 - wanted, rel=1e-12)


def test_weighted_anchor_where_nothing_matters_follows_the_weights():
    model = net()
    ewc = EWC(model, ewc_lambda=1.0, anchor="weighted")
    for task in range(3):
        move(model, task)
        ewc.consolidate(importance_of(model, 0.0))
    assert all(torch.equal(a, p) for a, p in zip(ewc.anchors().values(), model.parameters(), strict=True))


def test_consolidate_takes_any_mapping_and_any_float_dtype():
    model = net()
    ewc = EWC(model, ewc_lambda=1.0)
    ewc.consolidate({n: torch.full(p.shape, 0.5, dtype=torch.float16) for n, p in model.named_parameters()})
    assert all(t.dtype == torch.float32 and (t == 0.5).all() for t in ewc.importances().values())


def corrupted(model, **changes):
    imp = dict(importance_of(model))
    for name, value in changes.items():
        name = name.replace("__", ".").lstrip("_")
        if value is None:
            del imp[name]
        else:
            imp[name] = value
    return imp


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"_0__weight": torch.full((4, 3), float("nan"))}, ValueError, r"'0\.weight' has NaN"),
        ({"_0__bias": torch.full((4,), float("inf"))}, ValueError, r"'0\.bias' has infinite"),
        (
            {"_2__bias": torch.tensor([1.0, -1e-9])},
            ValueError,
            r"'2\.bias' has negative values \(minimum -1e-09\)",
        ),
        ({"_2__bias": torch.ones(3)}, ValueError, r"'2\.bias' has shape \(3,\), the parameter \(2,\)"),
        ({"_2__bias": None}, ValueError, r"missing: 2\.bias"),
        ({"other": torch.ones(2)}, ValueError, "unknown: other"),
        (
            {"_2__bias": torch.ones(2, dtype=torch.int64)},
            TypeError,
            r"'2\.bias' must be a floating-point tensor",
        ),
        ({"_2__bias": 1.0}, TypeError, r"'2\.bias' must be a floating-point tensor, got float"),
    ],
)
@pytest.mark.parametrize("tasks_before", [0, 1])
def test_bad_importance_changes_nothing(changes, error, text, tasks_before):
    model = net()
    ewc = EWC(model, ewc_lambda=1.0, variant="plain")
    for _ in range(tasks_before):
        ewc.consolidate(importance_of(model))
    move(model, 5)
    before = copy.deepcopy(ewc.state_dict())
    with pytest.raises(error, match=text):
        ewc.consolidate(corrupted(model, **changes))
    after = ewc.state_dict()
    assert after["num_tasks"] == tasks_before
    assert all(torch.equal(before["importance"][n], t) for n, t in after["importance"].items())
    assert all(torch.equal(before["anchor"][n], t) for n, t in after["anchor"].items())


def test_importance_of_another_model_zero_samples_overflow_and_no_mapping():
    model = net()
    ewc = EWC(model, ewc_lambda=1.0)
    with pytest.raises(ValueError, match=r"missing: 0\.weight"):
        ewc.consolidate(importance_of(nn.Sequential(nn.Identity(), nn.Linear(3, 4))))
    with pytest.raises(ValueError, match="zero samples"):
        ewc.consolidate(Importance(dict(importance_of(model)), num_samples=0, method="test"))
    with pytest.raises(TypeError, match="got list"):
        ewc.consolidate([torch.ones(1)])
    ewc.consolidate(importance_of(model, 3e38))
    with pytest.raises(ValueError, match="summed importance"):
        ewc.consolidate(importance_of(model, 3e38))
    assert ewc.num_tasks == 1


def test_not_strict_adds_zero_for_missing_names_only():
    model = net()
    ewc = EWC(model, ewc_lambda=1.0)
    imp = corrupted(model, _2__bias=None)
    ewc.consolidate(imp, strict=False)
    assert not ewc.importances()["2.bias"].any() and ewc.importances()["0.bias"].all()
    with pytest.raises(ValueError, match="unknown: other"):
        ewc.consolidate(imp | {"other": torch.ones(1)}, strict=False)


def test_exclude():
    model = net()
    ewc = EWC(model, ewc_lambda=1.0, exclude="2.*")
    ewc.consolidate(importance_of(model))  # its 2.* entries are ignored
    assert list(ewc.importances()) == ["0.weight", "0.bias"]
    typo = EWC(model, ewc_lambda=1.0, exclude=["2.*", "head.*"])
    with pytest.raises(ValueError, match=r"exclude pattern 'head\.\*' matches no parameter"):
        typo.consolidate(importance_of(model))
    assert typo.num_tasks == 0


def test_frozen_and_tied_parameters():
    model = net()
    model[0].weight.requires_grad_(False)
    model.again = model[2]
    ewc = EWC(model, ewc_lambda=1.0)
    ewc.consolidate(importance_of(model))
    assert list(ewc.importances()) == ["0.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"0\.weight do not require a gradient.*LoRA"):
        ewc.consolidate(dict(importance_of(model)) | {"0.weight": torch.ones(4, 3)})


def test_penalty_hand_worked():
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    ewc = EWC(model, ewc_lambda=4.0, variant="plain")
    ewc.consolidate({"weight": torch.tensor([[0.5, 3.0]])})
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 0.0]]))
    value = ewc.penalty()  # ½·4·(0.5·1² + 3·2²) = 25
    value.backward()
    assert value.item() == 25.0 and model.weight.grad.tolist() == [[2.0, -24.0]]
    stable = EWC(model, ewc_lambda=4.0)
    stable.load_state_dict(ewc.state_dict() | {"variant": "stabilized"})
    model.weight.grad = None
    stable.penalty(lr=0.25).backward()  # c = 2/(1+0.5), 12/(1+3)
    assert stable.variant == "stabilized"
    assert model.weight.grad.tolist() == [[pytest.approx(4 / 3), -6.0]]


def test_lr_may_be_a_number_a_tensor_or_the_optimizer():
    model = net().double()
    ewc = EWC(model, ewc_lambda=4.0)
    ewc.consolidate(importance_of(model))
    move(model, 3)
    value = ewc.penalty(lr=0.1).item()
    assert ewc.penalty(lr=torch.tensor(0.1, dtype=torch.float64)).item() == value
    assert ewc.penalty(lr=torch.optim.SGD(model.parameters(), lr=0.1)).item() == value
    two = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 5.0}], lr=0.1)
    assert ewc.penalty(lr=two).item() < value
    assert ewc.stats(two)["penalty"] == pytest.approx(ewc.penalty(lr=two).item(), rel=1e-12)
    with pytest.raises(ValueError, match="lr is needed"):
        ewc.penalty()
    with pytest.raises(ValueError, match="lr is needed"):
        ewc.stats(None)
    with pytest.raises(TypeError, match="got str"):
        ewc.penalty(lr="0.1")
    with pytest.raises(ValueError, match=r"does not hold these protected parameters.*2\.weight"):
        ewc.penalty(lr=torch.optim.SGD(model[0].parameters(), lr=0.1))


@pytest.mark.parametrize("variant", ["proximal", "wva"])
def test_maps_are_no_loss_terms(variant):
    model = net()
    ewc = EWC(model, ewc_lambda=4.0, variant=variant)
    ewc.consolidate(importance_of(model))
    with pytest.raises(ValueError, match="no loss term"):
        ewc.penalty(lr=0.1)
    assert ewc.stats(0.1)["max"] > 0


def test_penalty_refuses_to_count_twice():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0)
    ewc.consolidate(importance_of(model))
    opt = SGD(model.parameters(), lr=0.1, ewc=ewc)
    with pytest.raises(RuntimeError, match=r"already applied by SGD \(fused\)"):
        ewc.penalty(lr=opt)
    with torch.no_grad():
        assert ewc.penalty(lr=opt).item() == 0
    del opt
    import gc

    gc.collect()
    ewc.penalty(lr=0.1).backward()


def test_lambda_zero_changes_nothing():
    model = net()
    ewc = EWC(model, ewc_lambda=0.0)
    ewc.consolidate(importance_of(model))
    move(model, 1)
    ewc.penalty(lr=0.1).backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_nan_weights_never_become_anchors():
    model = net()
    ewc = EWC(model, ewc_lambda=4.0)
    ewc.consolidate(importance_of(model))
    state = copy.deepcopy(ewc.state_dict())
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"the weight of '2\.bias' has NaN"):
        ewc.consolidate(importance_of(model, 1.0))
    assert ewc.num_tasks == 1
    state["anchor"]["2.bias"][0] = float("inf")
    with pytest.raises(ValueError, match=r"the loaded anchor of '2\.bias' has infinite"):
        ewc.load_state_dict(state)


def test_an_excluded_pattern_may_match_frozen_parameters():
    model = net()
    model[0].requires_grad_(False)
    ewc = EWC(model, ewc_lambda=1.0, exclude="0.*")
    ewc.consolidate(importance_of(model))
    assert list(ewc.importances()) == ["2.weight", "2.bias"]


@pytest.mark.parametrize(
    "bad",
    [{3: torch.ones(1)}, {"0.weight": torch.ones(4, 3).to_sparse()}, {"0.weight": torch.ones(4, 3, device="meta")}],
)
def test_odd_importances_are_type_errors(bad):
    model = net()
    ewc = EWC(model, ewc_lambda=1.0)
    with pytest.raises(TypeError, match="importance"):
        ewc.consolidate(dict(importance_of(model)) | bad)
