"""Ω in uint8 and bfloat16, w* in bfloat16: what EWC keeps, adds up, saves and applies."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fastewc import EWC, Importance
from fastewc.ops.importance_codes import Codes
from fastewc.optim import SGD, AdamW
from fastewc.testing import assert_within_roundings, unit_roundoff
from tests.helpers import assert_same, importance_of, move, net

BFLOAT16 = unit_roundoff(torch.bfloat16)
NEAREST = {torch.uint8: 0.03, torch.bfloat16: BFLOAT16}
STOCHASTIC = {torch.uint8: 0.06, torch.bfloat16: 2 * BFLOAT16}
narrow = pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)


def conv_net(seed: int = 0) -> nn.Sequential:
    """More than one block, several layouts, an empty-looking corner."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(5, 30, 3), nn.Flatten(), nn.Linear(30, 70), nn.Linear(70, 3))


def spread(model: nn.Module, seed: int = 1, decades: float = 4.0) -> Importance:
    """Ω over some decades, every seventh 0."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for n, p in model.named_parameters():
        omega = 10 ** (decades * (torch.rand(p.shape, generator=g, dtype=torch.float64) - 1))
        omega.view(-1)[::7] = 0
        found[n] = omega.to(torch.promote_types(p.dtype, torch.float32))
    return Importance(found, num_samples=10, method="test")


def kept(model: nn.Module, tasks: int = 2, **options: object) -> EWC:
    options = {"ewc_lambda": 4.0, "importance_dtype": torch.uint8} | options
    ewc = EWC(model, **options)  # type: ignore[arg-type]
    for task in range(tasks):
        ewc.consolidate(spread(model, task))
        move(model, task)
    return ewc


@narrow
def test_the_first_task_is_rounded_to_nearest_and_the_next_within_two_steps(dtype):
    model = conv_net()
    ewc = EWC(model, ewc_lambda=1.0, importance_dtype=dtype)
    first, second = spread(model, 1), spread(model, 2)
    ewc.consolidate(first)
    held = ewc.importances()
    for name, omega in first.items():
        assert ((held[name] - omega).abs() <= NEAREST[dtype] * omega).all() and held[name].dtype == torch.float32
    assert held.num_samples == 10 and held.method == "test"
    ewc.consolidate(second)
    for name, omega in ewc.importances().items():
        total = held[name] + second[name]
        assert ((omega - total).abs() <= STOCHASTIC[dtype] * total).all()
    kind = ewc.state_dict()["importance"]["0.weight"].dtype
    assert kind == dtype


@narrow
def test_a_hundred_equal_tasks_are_a_hundred_times_one(dtype):
    model = nn.Linear(300, 300, bias=False)
    ewc = EWC(model, ewc_lambda=1.0, importance_dtype=dtype)
    task, tasks = spread(model, decades=2.0), 100
    for _ in range(tasks):
        ewc.consolidate(task)
    wanted = task["weight"].double() * tasks
    ratio = (ewc.importances()["weight"].double() / wanted)[wanted > 0]
    # K roundings of kΩ with a standard deviation of at most half a step each; the first is to nearest.
    deviation = STOCHASTIC[dtype] / 2 * (tasks**3 / 3) ** 0.5 / tasks
    assert abs(float(ratio.mean()) - 1) <= 6 * deviation / ratio.numel() ** 0.5 + NEAREST[dtype] / tasks
    assert float(ratio.std()) <= deviation
    stalled = task["weight"].bfloat16()
    for _ in range(tasks - 1):
        stalled = (stalled.float() + task["weight"]).bfloat16()
    # So the bound above can fail: to nearest, even bfloat16 strays.
    drift = (stalled.double() / wanted)[wanted > 0].mean() - 1
    assert abs(float(drift)) > 6 * STOCHASTIC[torch.bfloat16] / 2 * (tasks / 3) ** 0.5 / ratio.numel() ** 0.5


def test_a_running_mean_of_bfloat16_anchors_is_unbiased():
    """Equal tasks whose weights take turns: μ is their mean, and to nearest it would stop where 1/K is lost."""
    model, tasks = nn.Linear(200, 200, bias=False), 60
    ewc = EWC(model, ewc_lambda=1.0, anchor="weighted", anchor_dtype=torch.bfloat16)
    values = 1 + torch.rand(tasks, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        with pytest.warns(UserWarning, match="anchors were rounded to torch.bfloat16"):
            ewc.consolidate(importance_of(model, value=1.0))
    means = ewc.anchors()["weight"].double()
    mean = model.weight.new_tensor(values.tolist()).double().mean()
    # Rounding k is off by at most a step of 2·u·μ, with half of it as deviation, and counts k/K in the last mean.
    deviation = 2 * BFLOAT16 / 2 * 1.25 * (tasks / 3) ** 0.5
    assert abs(float(means.mean() - mean)) <= 6 * deviation / means.numel() ** 0.5 + BFLOAT16 * 1.25 / tasks
    assert ewc.anchors()["weight"].dtype == torch.bfloat16


def test_runs_repeat_and_take_no_random_numbers():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b = kept(conv_net(5), tasks=3), kept(conv_net(5), tasks=3)
    assert_same(a, b)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a.consolidate(spread(a.model))
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(before, state)


def test_the_rounding_of_anchors_is_reported():
    model = conv_net()
    ewc = EWC(model, ewc_lambda=1.0, anchor_dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="anchors were rounded") as caught:
        ewc.consolidate(spread(model))
    assert len(caught) == 1
    moved = torch.cat([(ewc.anchors()[n].float() - p.detach()).flatten() for n, p in model.named_parameters()])
    rms, largest = (float(x) for x in (moved.square().mean().sqrt(), moved.abs().max()))
    assert f"root mean square {rms:.3g}, largest {largest:.3g}" in str(caught[0].message) and largest > 0
    exact = conv_net().bfloat16().float()
    EWC(exact, ewc_lambda=1.0, anchor_dtype=torch.bfloat16).consolidate(spread(exact))  # no warning: it would raise


def decoded_twin(ewc: EWC, model: nn.Module) -> EWC:
    """The same Ω and w* in float32."""
    state = ewc.state_dict() | {"importance_dtype": "float32", "importance_scales": {}}
    state["importance"] = dict(ewc.importances())
    twin = EWC(model, ewc_lambda=0.0)
    twin.load_state_dict(state)
    return twin


def grads(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)


def attached(model: nn.Module, ewc: EWC) -> torch.optim.Optimizer:
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    ewc.attach(opt)
    return opt


@pytest.mark.parametrize("variant", ["plain", "stabilized", "proximal", "wva"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("importance_dtype", [torch.uint8, torch.bfloat16], ids=str)
def test_every_way_to_apply_it_gives_the_bits_of_the_decoded_numbers(variant, dtype, importance_dtype):
    options = {"variant": variant, "importance_dtype": importance_dtype}
    if dtype != torch.bfloat16:
        options["anchor_dtype"] = torch.float32 if dtype == torch.float64 else None
    model = conv_net().to(dtype)
    ewc = kept(model, **options)
    twin_model = copy.deepcopy(model)
    twin = decoded_twin(ewc, twin_model)

    def same() -> None:
        for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
            assert torch.equal(a, b)

    if variant in ("plain", "stabilized"):
        values = [one.penalty(lr=0.1) for one in (ewc, twin)]
        assert values[0] == values[1] and values[0] > 0
        for value, net_ in zip(values, (model, twin_model), strict=True):
            net_.zero_grad()
            value.backward()
        for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    assert ewc.stats(0.1) == twin.stats(0.1)
    for build in (
        lambda m, e: AdamW(m.parameters(), lr=0.01, ewc=e),
        lambda m, e: SGD(m.parameters(), lr=0.01, momentum=0.9, ewc=e, impl="reference"),
        attached,
    ):
        pairs = [(m, build(m, e)) for m, e in ((model, ewc), (twin_model, twin))]
        for step in range(3):
            for m, opt in pairs:
                grads(m, step)
                opt.step()
            same()


def test_a_step_is_that_of_the_reference(device="cpu"):
    models = [conv_net() for _ in range(2)]
    for model, impl in zip(models, ("auto", "reference"), strict=True):
        ewc = kept(model, tasks=1)
        opt = AdamW(model.parameters(), lr=0.01, ewc=ewc, impl=impl)
        for step in range(5):
            grads(model, step)
            opt.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert_within_roundings(a.detach(), b.detach().double(), roundings=200, error_scale=b.detach().abs() + 0.1)


@narrow
def test_files_and_state_dicts(dtype, tmp_path):
    model = conv_net()
    ewc = kept(model, importance_dtype=dtype, gamma=0.5)
    ewc.save(tmp_path / "f")
    loaded = EWC.load(tmp_path / "f", conv_net(1))
    assert_same(ewc, loaded)
    torch.save(ewc.state_dict(), tmp_path / "state.pt")
    other = EWC(conv_net(2), ewc_lambda=0.0)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(ewc, other)
    for twin in (copy.deepcopy(ewc), pickle.loads(pickle.dumps(ewc))):
        assert_same(ewc, twin)
    before = {n: t.clone() for n, t in ewc.importances().items()}
    other.consolidate(spread(other.model, 9))
    assert all(torch.equal(t, before[n]) for n, t in ewc.importances().items())
    for one in (ewc, loaded):  # both go on alike
        one.consolidate(spread(model, 9))
    assert all(torch.equal(t, loaded.importances()[n]) for n, t in ewc.importances().items())
    empty = EWC(model, ewc_lambda=1.0, importance_dtype=dtype)
    assert empty.state_dict().keys() == ewc.state_dict().keys()
    assert all(not t.any() for t in empty.importances().values())


def damaged(state: dict, kind: str, change) -> dict:
    bad = copy.deepcopy(state)
    bad[kind]["0.weight"] = change(bad[kind]["0.weight"])
    return bad


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("importance_scales", lambda t: t[:1]),
        ("importance_scales", lambda t: t * 3),
        ("importance_scales", lambda t: t * torch.nan),
        ("importance", lambda t: t.float()),
        ("importance", lambda t: t.int()),
        ("importance", lambda t: t[:2]),
    ],
)
def test_damaged_codes_are_refused(kind, change):
    ewc = kept(conv_net())
    good = copy.deepcopy(ewc.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight"):
        ewc.load_state_dict(damaged(good, kind, change))
    missing = copy.deepcopy(good)
    del missing["importance_scales"]["0.weight"]
    with pytest.raises(ValueError, match=r"same names.*0\.weight"):
        ewc.load_state_dict(missing)
    other = EWC(conv_net(1), ewc_lambda=0.0)
    other.load_state_dict(good)
    assert_same(ewc, other)


def test_codes_follow_the_layout_of_the_weights(tmp_path):
    model = conv_net()
    ewc = kept(model)
    before = {n: t.clone() for n, t in ewc.importances().items()}
    weight = model[0].weight

    def check(one: EWC, w: Tensor) -> None:
        omega, _ = one.held(w)
        assert isinstance(omega, Codes) and omega.lie_as(w) and omega.codes.stride() == w.stride()
        assert all(torch.equal(t, before[n]) for n, t in one.importances().items())
        assert one.held(w)[0] is omega

    check(ewc, weight)
    model.to(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    check(ewc, weight)
    ewc.save(tmp_path / "f")  # files have one order
    for target in (conv_net(1), conv_net(1).to(memory_format=torch.channels_last)):
        check(EWC.load(tmp_path / "f", target), target[0].weight)
    twin = copy.deepcopy(ewc)
    check(twin, twin.model[0].weight)
    ewc.consolidate({n: torch.zeros_like(t) for n, t in before.items()})
    check(ewc, weight)  # what has a code is not rounded again


def test_codes_follow_growing_renaming_and_dtypes():
    model = net()
    ewc = kept(model)
    before = {n: t.clone() for n, t in ewc.importances().items()}
    model[2] = nn.Linear(4, 3)
    with pytest.warns(UserWarning, match=r"grown: 2\.weight"):
        ewc.rebind(strict=False)
    after = ewc.importances()
    assert torch.equal(after["2.weight"][:2], before["2.weight"]) and not after["2.weight"][2:].any()
    model.double()
    assert ewc.importances()["0.weight"].dtype == torch.float64
    assert torch.equal(ewc.importances()["0.weight"].float(), before["0.weight"])
    model.float()
    renamed = nn.Module()
    renamed.a = model
    ewc.rebind(renamed, rename={n: f"a.{n}" for n in after})
    assert torch.equal(ewc.importances()["a.0.weight"], before["0.weight"])


@narrow
@pytest.mark.parametrize("value", [torch.inf, torch.nan, -1.0, 3.4e38])
def test_what_has_no_code_is_refused_and_changes_nothing(dtype, value):
    model = net()
    ewc = kept(model, importance_dtype=dtype)
    before = copy.deepcopy(ewc.state_dict())
    bad = dict(importance_of(model))
    bad["2.weight"] = bad["2.weight"].clone()
    bad["2.weight"][0, 0] = value
    with pytest.raises(ValueError, match=r"2\.weight"):
        ewc.consolidate(bad)
    assert ewc.num_tasks == 2
    assert all(torch.equal(before["importance"][n], t) for n, t in ewc.state_dict()["importance"].items())


@narrow
def test_gamma_forgets(dtype):
    model = conv_net()
    first, second = spread(model, 1), spread(model, 2)
    ewc = EWC(model, ewc_lambda=1.0, gamma=0.25, importance_dtype=dtype)
    ewc.consolidate(first)
    held = ewc.importances()
    ewc.consolidate(second)
    for name, omega in ewc.importances().items():
        total = 0.25 * held[name] + second[name]
        assert ((omega - total).abs() <= STOCHASTIC[dtype] * total).all()
