"""What lies around the layers: checkpoints, escapes, routing by value, dtypes, labels, what a pass leaves behind."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastewc import fisher_importance, mas_importance
from fastewc.testing import assert_within_roundings
from tests.per_sample.checking import (
    Cube,
    Lambda,
    assert_exact,
    assert_importance,
    batches,
    floats,
    naive,
    paths,
    scales_of,
    weight,
)  # fmt: skip

TOKENS = floats(6, 3, 4)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


# ── checkpoints ──


class Checkpointed(nn.Module):
    """Checkpoints inside checkpoints; a weight is used inside, outside and in the next one."""

    def __init__(self, outer, inner):
        super().__init__()
        self.first, self.tied, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.outer, self.inner = outer, inner

    def forward(self, x):
        def block(h):
            h = torch.tanh(self.tied(h))
            return checkpoint(lambda z: F.linear(z, self.tied.weight).relu_(), h, use_reentrant=self.inner) + h

        h = self.first(x)
        for _ in range(2):
            h = checkpoint(block, h, use_reentrant=self.outer)
        return self.last(self.tied(h))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, where there is no gradient at all
@pytest.mark.parametrize("inner", [False, True], ids=["non-reentrant in", "reentrant in"])
@pytest.mark.parametrize("outer", [False, True], ids=["non-reentrant", "reentrant"])
def test_nested_checkpoints(outer, inner):
    assert_exact(Checkpointed(outer, inner).double().eval(), TOKENS().double())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_the_first_layer(reentrant):
    model = Lambda(
        lambda m, x: m.b(checkpoint(m.a, x.detach().requires_grad_(), use_reentrant=reentrant).tanh()),
        a=nn.Linear(4, 4), b=nn.Linear(4, 3),
    )  # fmt: skip
    assert_exact(model.double().eval(), TOKENS().double())


# ── uses that nobody shows, and functions without a rule ──


def test_custom_function_with_many_backwards():
    model = Lambda(lambda m, x: m.out(Cube.apply(m.a(x), m.w)), a=nn.Linear(4, 4), w=weight(3, 4), out=nn.Linear(3, 3))
    model, x = model.double().eval(), TOKENS().double()[:, 0]
    got = fisher_importance(model, [x], labels="expected")
    assert_importance(got, fisher_importance(model, [x], labels="expected", impl="reference"))
    assert got.report["w"][0] == "batch-1"


def test_custom_function():
    model = Lambda(lambda m, x: m.out(Cube.apply(m.a(x), m.w)), a=nn.Linear(4, 4), w=weight(3, 4), out=nn.Linear(3, 3))
    assert_exact(model.double().eval(), TOKENS().double(), slow={"w"})


def test_custom_function_on_what_is_made_of_a_parameter():
    model = Lambda(lambda m, x: Cube.apply(x, m.w.T * 2) + m.u, w=weight(4, 3), u=weight(3))
    assert_exact(model.double().eval(), TOKENS().double(), slow={"w"})


def test_a_parameter_that_is_also_kept_elsewhere():
    model = Lambda(lambda m, x: m.out(F.linear(x, m.kept[0])) + F.linear(x, m.w), w=weight(3, 4), out=nn.Linear(3, 3))
    model = model.double()
    model.kept = [model.w]
    got = fisher_importance(model.eval(), [(TOKENS().double(), torch.zeros(6, 3, dtype=torch.long))])
    assert got.report["w"][0] == "batch-1"
    assert "itself" in got.report["w"][1]
    assert_exact(model, TOKENS().double(), slow={"w"})


@pytest.mark.parametrize("write", ["zero_", "setitem", "mul_"])
def test_a_write_into_what_was_made_of_a_parameter(write):
    def forward(model, x):
        bias = model.out.bias.clone()
        if write == "zero_":
            bias[1:3].zero_()
        elif write == "setitem":
            bias[1:3] = 0.5
        else:
            bias.narrow(0, 0, 2).mul_(3.0)
        return F.linear(x, model.out.weight, bias)

    model = Lambda(forward, out=nn.Linear(4, 4)).double().eval()
    assert_exact(model, TOKENS().double())


def test_a_write_into_what_other_arithmetic_has_met():
    def forward(model, x):
        part = model.w.clone()
        both = part + model.u
        part[1:3].zero_()
        return x * both.tanh() + part

    assert_exact(Lambda(forward, w=weight(4), u=weight(4)).double().eval(), TOKENS().double())


@pytest.mark.parametrize("write", ["a row", "all"])
def test_a_write_into_rows_of_a_table(write):
    def forward(model, x):
        rows = F.embedding(torch.tensor([4, 0, 4]), model.table)
        if write == "all":
            rows.mul_(3.0)
        else:
            rows[1:2].zero_()
        return (x + rows).tanh()

    assert_exact(Lambda(forward, table=weight(5, 4)).double().eval(), TOKENS().double())


def test_a_mixing_write_into_what_was_made_of_a_parameter():
    def forward(model, x):
        bias = model.out.bias.clone()
        bias.cumsum_(0)
        return F.linear(x, model.out.weight, bias)

    assert_exact(Lambda(forward, out=nn.Linear(4, 4)).double().eval(), TOKENS().double())


@torch.library.custom_op("fastewc_tests::halved", mutates_args=())
def halved(w: torch.Tensor) -> torch.Tensor:
    return w / 2


def look_and_halve(ctx, g):
    assert g.sum().item() == g.sum().item()
    return g / 2


halved.register_autograd(look_and_halve)


def test_arithmetic_that_several_gradients_cannot_go_back_through_together():
    model = Lambda(lambda m, x: x * (halved(m.w) * m.u.softmax(0)), w=weight(4), u=weight(4))
    assert_exact(model.double().eval(), TOKENS().double(), op={"w", "u"})


def test_arithmetic_with_too_many_gradients_to_go_back_together(monkeypatch):
    monkeypatch.setattr("fastewc.per_sample.made.EXPLICIT", 4)
    model = Lambda(lambda m, x: x * m.w.softmax(0), w=weight(4))
    assert_exact(model.double().eval(), TOKENS().double(), op={"w"})


def test_a_write_into_what_samples_have_met():
    def forward(model, x):
        bias = model.out.bias.clone()
        before = x + bias
        bias[1:3].zero_()
        return F.linear(before.tanh(), model.out.weight, bias)

    assert_exact(Lambda(forward, out=nn.Linear(4, 4)).double().eval(), TOKENS().double(), slow={"out.bias"})


def test_a_long_way_from_the_parameter_with_sizes_like_the_numbers_of_samples():
    def forward(model, x):
        table = F.linear(torch.ones(2, 2, dtype=x.dtype), model.a).relu()
        table = F.linear(table, model.b).view(4, 1)[[0, 2]].view(1, 2).permute(1, 0).contiguous().unsqueeze(0)
        return model.out(x) * (2 * table.sigmoid()).view(2)

    model = Lambda(forward, a=weight(2, 2), b=weight(2, 2), out=nn.Linear(4, 2)).double().eval()
    assert_exact(model, TOKENS().double())


def test_recurrent_by_cells():
    def forward(model, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h = torch.tanh(model.a(step) + model.b(h))
        return model.out(h)

    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "out": nn.Linear(4, 2)}
    assert_exact(Lambda(forward, **parts).double().eval(), TOKENS().double())


# ── which samples are where depends on values ──


class Experts(nn.Module):
    """Tokens go to the expert that a gate likes best, by one of the ways to write it."""

    def __init__(self, how, first=True):
        super().__init__()
        self.before = nn.Linear(4, 4) if first else nn.Identity()
        self.gate, self.how = nn.Linear(4, 3), how
        self.w, self.b = weight(3, 4, 2), weight(3, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3)) if how in ("mask", "sorted") else None

    def forward(self, x):
        h = torch.tanh(self.before(x))
        scores, best = self.gate(h).softmax(-1).max(-1)
        if self.how == "gather":
            out = torch.einsum("nti,ntio->nto", h, self.w[best]) + self.b[best]
        elif self.how == "dense":
            out = (torch.einsum("nti,eio->nteo", h, self.w) * F.one_hot(best, 3).unsqueeze(-1)).sum(2) + self.b[best]
        else:
            flat, chosen = h.flatten(0, 1), best.flatten()
            out = flat.new_zeros(len(flat), 2)
            if self.how == "mask":
                for e, expert in enumerate(self.experts):
                    out[chosen == e] = expert(flat[chosen == e])
            else:
                order = chosen.argsort(stable=True)
                parts = flat[order].split(torch.bincount(chosen, minlength=3).tolist())
                done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
                out = out.index_copy(0, order, done)
            out = out.view(*x.shape[:2], 2)
        return out * scores.unsqueeze(-1)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("how", ["mask", "sorted", "gather", "dense"])
def test_experts(how, length):
    model = Experts(how).double().eval()
    listed = {n for n, _ in model.named_parameters() if n.startswith("experts.")}
    if listed:
        del model.w, model.b
    x = floats(6, length, 4)().double()
    got = mas_importance(model, [x])
    assert {"before.weight", "gate.weight"} <= paths(got)["fused"]
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], 6, power=1)
    assert_importance(got, oracle)
    assert listed <= paths(got)["batch-1"] | paths(got)["unused"]


@pytest.mark.parametrize("trial", range(5))
def test_expert_sizes_that_fit_by_chance(trial):
    # As many tokens as samples, from some samples several and from others none.
    torch.manual_seed(trial)
    model = Lambda(
        lambda m, x: x.new_zeros(x.shape[:2]).masked_scatter(x[..., 0] > 0, m.e(m.a(x)[x[..., 0] > 0]).squeeze(-1)),
        a=nn.Linear(4, 4), e=nn.Linear(4, 1),
    ).double().eval()  # fmt: skip
    x = torch.randn(4, 2, 4).double()
    x[..., 0] = -1
    x[0, 0, 0] = x[1, 0, 0] = x[2, 0, 0] = x[2, 1, 0] = 1
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], 4, power=1)
    assert_importance(mas_importance(model, [x]), oracle)


def test_samples_in_sorted_order():
    def forward(model, x):
        order = x[:, 0, 0].argsort()
        h = torch.tanh(model.a(x[order]))
        return (model.b(h)[order.argsort()] + model.a(x)) @ model.w

    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "w": weight(4, 2)}
    x = TOKENS().double()
    x[:, 0, 0] = torch.tensor([0.0, 1.0, 5.0, 4.0, 3.0, 2.0])
    model = Lambda(forward, **parts).double().eval()
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], 6, power=1)
    assert_importance(mas_importance(model, [x]), oracle)


@pytest.mark.parametrize("offset", [0, 100])
def test_samples_in_another_order_inside(offset):
    model = Lambda(lambda m, x: m.a(m.a(x).flip(0) + x.flip(0)).flip(0), a=nn.Linear(4, 4)).double().eval()
    assert_exact(model, TOKENS().double() + offset, slow={"a.weight", "a.bias"})


def test_branches():
    def forward(model, x):
        h = model.a(x)
        return model.b(h).sum(1) if x.shape[1] > 3 else model.c(h).tanh().sum(1)

    model = Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2), c=nn.Linear(4, 2)).double().eval()
    data = [torch.randn(3, length, 4, dtype=torch.float64) for length in (2, 4, 2)]
    each = [one for batch in data for one in batch.split(1)]
    oracle = naive(model, lambda i: [(1.0, model(each[i]).square().sum())], 9, power=1)
    assert_importance(mas_importance(model, data), oracle)


def test_a_use_of_one_sample_only():
    # The output of the first sample is the same in company, but the others' depend on it.
    model = Lambda(lambda m, x: m.b(torch.tanh(m.a(x))[:1]) + m.c(x), a=nn.Linear(4, 4), b=nn.Linear(4, 3),
                   c=nn.Linear(4, 3)).double().eval()  # fmt: skip
    x = TOKENS().double()
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], 6, power=1)
    assert_importance(mas_importance(model, [x]), oracle)


def test_parts_without_gradients():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.w = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), weight(3)

        def forward(self, x):
            with torch.no_grad():
                h = self.a(x)
            return self.c(self.b(x).detach() + self.b(h)) * self.w + self.w.detach() * self.c.bias.data

    assert_exact(Cut().double().eval(), TOKENS().double(), unused={"a.weight", "a.bias"})


def test_loops_over_samples():
    def forward(model, x):
        return torch.stack([model.a(one) for one in x]) + model.w

    model = Lambda(forward, a=nn.Linear(4, 3), w=weight(3)).double().eval()
    assert_exact(model, TOKENS().double(), slow={"a.weight", "a.bias"})


def test_samples_that_are_all_the_same():
    assert_exact(mlp().double().eval(), torch.ones(4, 3, 4, dtype=torch.float64))
    merged = Lambda(lambda m, x: m.a(x.flatten(0, 1)).view(*x.shape[:2], 3), a=nn.Linear(4, 3)).double().eval()
    assert_exact(merged, torch.ones(4, 3, 4, dtype=torch.float64), slow={"a.weight", "a.bias"})


# ── dtypes ──


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_models(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)).to(dtype).eval()
    x = torch.randn(5, 3, 8).to(dtype)
    got = mas_importance(model, [x])
    assert all(value.dtype == torch.float32 for value in got.values())
    assert paths(got)["fused"] == set(got)
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).float().square().sum())], 5, power=1)
    # The oracle rounds each sample's gradient to the model's dtype, and both round activations and their gradients.
    assert_importance(got, oracle, roundings=32, dtype=dtype, scales=scales_of(oracle, 1))


def test_autocast():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.LayerNorm(40), nn.Linear(40, 6))
    model, x = model.eval(), torch.randn(6, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = mas_importance(model, [x])
        oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).float().square().sum())], 6, power=1)
    assert paths(got)["fused"] == set(got)
    assert_importance(got, oracle, roundings=32, dtype=torch.bfloat16, scales=scales_of(oracle, 1))


def test_autocast_with_a_weight_used_twice():
    layer = nn.Linear(6, 6)
    model, x = nn.Sequential(layer, nn.Tanh(), layer).eval(), torch.randn(6, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got = mas_importance(model, [x])
        oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).float().square().sum())], 6, power=1)
    assert_importance(got, oracle, roundings=32, dtype=torch.bfloat16, scales=scales_of(oracle, 1))


# ── labels, losses, batches ──


@pytest.mark.parametrize("labels", ["dataset", "predicted", "sampled", "expected"])
def test_labels_as_sample_by_sample(labels):
    model = Experts("gather").double().eval()
    x, y = TOKENS().double(), torch.randint(0, 2, (6, 3))
    y[0, 1] = y[2, 0] = y[3, 1:] = -100
    found = {}
    for impl in ("auto", "reference"):
        torch.manual_seed(4)
        found[impl] = fisher_importance(model, batches(x, y, cuts=(1, 4)), labels=labels, impl=impl)
    assert_importance(found["auto"], dict(found["reference"]))
    assert paths(found["reference"])["batch-1"] == set(found["reference"])


def test_draws_are_the_same_again_for_parameters_that_go_sample_by_sample():
    model = Lambda(lambda m, x: Cube.apply(m.a(x), m.w), a=nn.Linear(4, 4), w=weight(3, 4)).double().eval()
    found = {}
    for impl in ("auto", "reference"):
        torch.manual_seed(4)
        found[impl] = fisher_importance(model, [TOKENS().double()], labels="sampled", impl=impl)
    assert paths(found["auto"])["batch-1"] == {"w"}
    assert_importance(found["auto"], dict(found["reference"]))


def test_loss_with_parameters():
    model = Lambda(lambda m, x: m.a(x).mean(1), a=nn.Linear(4, 3), w=weight(3), u=weight(3)).double().eval()

    def loss(out, target):
        return ((out - target) * model.w).square().sum(1) + model.u.square().sum()

    x, y = TOKENS().double(), torch.randn(6, 3, dtype=torch.float64)
    got = fisher_importance(model, batches(x, y, cuts=(3,)), loss=loss)
    oracle = naive(model, lambda i: [(1.0, loss(model(x[i : i + 1]), y[i : i + 1]).sum())], 6)
    assert_importance(got, oracle)


@pytest.mark.parametrize(
    "squeeze", [lambda t: t.squeeze(), lambda t: t.squeeze(-1), lambda t: t[..., 0]], ids=["all", "last", "first"]
)
def test_output_of_one_number(squeeze):
    model = Lambda(lambda m, x: squeeze(m.a(x)), a=nn.Linear(4, 1)).double().eval()
    x, y = torch.randn(5, 4).double(), torch.randint(0, 2, (5,))

    def losses(i):
        return [(1.0, F.binary_cross_entropy_with_logits(model.a(x[i]), y[i : i + 1].double()))]

    assert_importance(fisher_importance(model, [(x, y)], loss="bernoulli"), naive(model, losses, 5))


@pytest.mark.parametrize("n", [3, 4, 5])
def test_time_major(n):
    model = Lambda(lambda m, x: m.out(torch.tanh(m.a(x)).cumsum(0)), a=nn.Linear(4, 5), out=nn.Linear(5, 3))
    model = model.double().eval()
    x, y = torch.randn(4, n, 4, dtype=torch.float64), torch.randint(0, 3, (4, n))
    got = fisher_importance(model, [(x, y)], batch_dim=1)
    oracle = naive(model, lambda i: [(1.0, F.cross_entropy(model(x[:, i : i + 1])[:, 0], y[:, i], reduction="sum"))], n)
    assert_importance(got, oracle)
    assert paths(got)["fused"] == set(got)
    custom = fisher_importance(model, [(x, y)], batch_dim=1, forward=lambda m, b: (m(b[0]).transpose(0, 1), b[1].T))
    assert_importance(custom, oracle)


def test_batches_add_up_and_parts_of_a_batch_too(monkeypatch):
    model, x = mlp().double().eval(), torch.randn(23, 3, 4, dtype=torch.float64)
    one = mas_importance(model, [x])
    assert_importance(mas_importance(model, list(x.split(5))), dict(one))
    monkeypatch.setattr("fastewc.per_sample.engine.CACHED", 1)
    assert_importance(mas_importance(model, [x]), dict(one))


def test_excluded_parameters():
    model, x = mlp().double().eval(), TOKENS().double()
    whole, part = mas_importance(model, [x]), mas_importance(model, [x], exclude=("0.weight", "2.bias"))
    assert set(part) == {"0.bias", "2.weight"}
    assert all(torch.equal(value, whole[name]) for name, value in part.items())


def test_an_excluded_part_of_arithmetic():
    model = Lambda(lambda m, x: F.linear(x, m.base.T + m.b @ m.a), base=weight(4, 3), a=weight(2, 4), b=weight(3, 2))
    x = TOKENS().double()
    model = model.double().eval()
    got = mas_importance(model, [x], exclude="base")
    oracle = naive(model, lambda i: [(1.0, model(x[i : i + 1]).square().sum())], 6, power=1)
    assert_importance(got, {n: v for n, v in oracle.items() if n != "base"})


def test_same_bits_every_time():
    model, x = Checkpointed(False, False).eval(), TOKENS()
    first, again = mas_importance(model, [x]), mas_importance(model, [x])
    assert all(torch.equal(first[name], again[name]) for name in first)


# ── what is left behind ──


def state(model):
    return (
        {name: (id(p), p.grad, p._version, p.detach().clone()) for name, p in model.named_parameters()},
        {name: (id(b), b.clone()) for name, b in model.named_buffers()},
        torch.get_rng_state(),
        [(m.training, dict(m._parameters)) for m in model.modules()],
    )


def assert_untouched(model, before):
    parameters, buffers, generator, modules = before
    for name, p in model.named_parameters():
        number, grad, version, value = parameters[name]
        assert (id(p), p._version) == (number, version)
        assert p.grad is grad
        assert torch.equal(p, value)
    assert all(id(b) == buffers[n][0] and torch.equal(b, buffers[n][1]) for n, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), generator)
    for module, (training, slots) in zip(model.modules(), modules, strict=True):
        assert module.training == training
        assert all(module._parameters[name] is p for name, p in slots.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_model_is_left_alone(reentrant):
    model = nn.Sequential(Checkpointed(reentrant, reentrant), nn.BatchNorm1d(3)).double().eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x = TOKENS().double()
    before = state(model)
    mas_importance(model, [x])
    assert_untouched(model, before)
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


@pytest.mark.parametrize("at", ["forward", "backward", "loss"])
def test_errors_leave_the_parameters_in_place(at):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            raise KeyError("backward")

    def forward(model, x):
        h = model.a(x)
        if at == "forward" and len(x) > 2:
            raise KeyError("forward")
        return Fails.apply(h) if at == "backward" else h

    def loss(out, target):
        if at == "loss" and len(out) > 2:
            raise KeyError("loss")
        return out.sum((1, 2))

    model = Lambda(forward, a=nn.Linear(4, 4)).double().eval()
    x = TOKENS().double()
    before = state(model)
    with pytest.raises(KeyError, match=at):
        fisher_importance(model, [x], loss=loss)
    assert_untouched(model, before)


def test_forwards_that_mix_samples_are_refused():
    centred = Lambda(lambda m, x: m.a(x) - m.a(x).mean(0), a=nn.Linear(4, 3)).double().eval()
    with pytest.raises(ValueError, match="mixes samples"):
        mas_importance(centred, [TOKENS().double()])
    turned = Lambda(lambda m, x: m.a(x).flip(0), a=nn.Linear(4, 3)).double().eval()
    with pytest.raises(ValueError, match="mixes samples"):
        mas_importance(turned, [TOKENS().double()])


def test_the_copy_of_a_model_during_a_pass_is_not_needed_after_it():
    model = mlp().double().eval()
    mas_importance(model, [TOKENS().double()])
    twin = copy.deepcopy(model)
    assert_within_roundings(twin(torch.ones(1, 4).double()), model(torch.ones(1, 4).double()).detach(), roundings=0)


def test_results_are_kept_no_longer_than_torch_keeps_them():
    """The result of a layer whose successor does not save it is free again, during the forward."""
    held = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.out = nn.Linear(4, 123), nn.Linear(123, 3)

        def forward(self, x):
            hidden = self.wide(x)
            memory, shape = hidden.data_ptr(), hidden.shape
            active = hidden.relu()  # saves its own result
            del hidden
            found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape]
            held.append(sum(t.data_ptr() == memory for t in found))
            return self.out(active)

    fisher_importance(Model(), [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))])
    assert held[-1] == 0
