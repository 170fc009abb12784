"""What every importance pass reads, refuses, leaves alone and puts back."""

import collections
import collections.abc
import functools
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import fastewc
from fastewc import fisher_importance, mas_importance, signal_importance
from fastewc.testing import assert_within_roundings

PASSES = [fisher_importance, mas_importance, signal_importance]
each_pass = pytest.mark.parametrize("importance", PASSES, ids=lambda f: f.__name__)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def xy(n=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def same(a, b, roundings=200):
    assert list(a) == list(b)
    for name in a:
        assert_within_roundings(a[name], b[name].double(), roundings=roundings, context=name)


def near(got, wanted):
    assert_within_roundings(got, wanted.double(), roundings=200)


# ── data ──


@each_pass
def test_any_split_gives_the_same(importance):
    model, (x, y) = net(), xy(7)
    whole = importance(model, [(x, y)])
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for data in (loader, [(x[:1], y[:1]), (x[1:], y[1:])], iter([[x[:5], y[:5]], [x[5:], y[5:]]])):
        got = importance(model, data)
        same(got, whole)
        assert got.num_samples == 7
    same(importance(model, [(x[:0], y[:0]), (x, y)]), whole)


@each_pass
def test_max_samples_is_exact_and_stops_reading(importance):
    model, (x, y) = net(), xy(7)

    def data():
        yield x[:3], y[:3]
        yield x[3:], y[3:]
        raise AssertionError("read too far")

    got = importance(model, data(), max_samples=5)
    same(got, importance(model, [(x[:5], y[:5])]))
    assert got.num_samples == 5
    assert importance(model, [(x, y)], max_samples=100).num_samples == 7
    assert importance(model, [(x, y)], max_samples=np.int64(5)).num_samples == 5


@each_pass
@pytest.mark.parametrize("bad", [0, -1, True, 2.0])
def test_bad_max_samples(importance, bad):
    with pytest.raises((ValueError, TypeError), match="max_samples"):
        importance(net(), [xy()], max_samples=bad)


@each_pass
def test_data_that_is_one_batch(importance):
    x, y = xy()
    for data in (x, (x, y), [x, y], (x, x), [x, x[:, :2]], {"inputs": x}):
        with pytest.raises(ValueError, match="batch"):
            importance(net(), data)
    with pytest.raises(TypeError, match="iterable"):
        importance(net(), 3)


def test_a_list_of_two_tensor_batches_is_two_batches():
    x, _ = xy()
    same(mas_importance(net(), [x[:3], x[3:]]), mas_importance(net(), [x]))


@each_pass
def test_no_samples(importance):
    with pytest.raises(ValueError, match="no samples"):
        importance(net(), [])
    with pytest.raises(ValueError, match="no samples"):
        importance(net(), [(xy()[0][:0], xy()[1][:0])])


@each_pass
@pytest.mark.parametrize(
    ("batch", "error", "word"),
    [
        (lambda x, y: (x, y, y), ValueError, "forward"),
        (lambda x, y: ((x, x), y), TypeError, "forward"),
        (lambda x, y: (x, 3), TypeError, "DataLoader"),
        (lambda x, y: "text", TypeError, "forward"),
        (lambda x, y: (x, y[:3]), ValueError, "cut"),
        (lambda x, y: {"a": 1}, TypeError, "tensor"),
        (lambda x, y: {"input": x, "other": x[:4]}, ValueError, "cut"),
        (lambda x, y: (x[0], y[0]), ValueError, "cut"),
        (lambda x, y: x[0, 0], ValueError, "DataLoader"),
    ],
)
def test_batches_that_cannot_be_read(importance, batch, error, word):
    with pytest.raises(error, match=word):
        importance(net(), [batch(*xy())])


def test_mapping_with_scalars_and_constants():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, shift, flag, factor):
            assert flag == "on"
            return types.SimpleNamespace(logits=self.net(x * factor + shift))

    x, y = xy()
    shift = torch.ones(1, 4, dtype=torch.float64)
    batch = {"x": x, "shift": shift, "flag": "on", "factor": torch.tensor(2.0, dtype=torch.float64), "labels": y}
    got = fisher_importance(Model(), [batch])
    same(got.rename({n: n[4:] for n in got}), fisher_importance(net(), [(x * 2 + 1, y)]))
    assert "labels" in batch


def test_forward_cuts_everything_that_counts_samples():
    Pair = collections.namedtuple("Pair", "left right")
    seen = []

    def forward(model, batch):
        pair, words, y, table = batch
        seen.append((len(pair.left), len(pair.right["deep"]), words, len(y), len(table)))
        return model(pair.left + pair.right["deep"]), y

    x, y = xy(3)
    batch = [Pair(x, {"deep": x}), ["a", "b", "c"], y, torch.zeros(10)]
    got = fisher_importance(net(), [batch], forward=forward)
    same(got, fisher_importance(net(), [(2 * x, y)]))
    # Its first two samples and the first one alone are the first look.
    assert seen == [(n, n, ["a", "b", "c"][:n], n, 10) for n in (2, 1, 3)]
    seen.clear()
    fisher_importance(net(), [batch], forward=forward, impl="reference")
    assert seen == [(3, 3, ["a", "b", "c"], 3, 10), *((1, 1, [w], 1, 10) for w in "aabc")]


@pytest.mark.parametrize("result", [3, (1, 2, 3), (torch.ones(1, 3), "y")])
def test_forward_must_return_output_and_target(result):
    with pytest.raises(TypeError, match=r"forward|target"):
        fisher_importance(net(), [xy()], forward=lambda m, b: result)


def test_packed_sequences_are_refused():
    packed = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    with pytest.raises(TypeError, match="PackedSequence"):
        mas_importance(net(), [(packed,)], forward=lambda m, b: (m(b), None))


def test_output_must_be_a_tensor_with_the_batch_in_it():
    x, y = xy()
    for wrap in (lambda out: (out, out), lambda out: {"scores": out}):
        model = net()
        model.forward = lambda x, m=model, wrap=wrap: wrap(nn.Sequential.forward(m, x))
        for importance in (fisher_importance, mas_importance):
            with pytest.raises(TypeError, match="forward"):
                importance(model, [(x, y)])
    with pytest.raises(ValueError, match="batch_dim"):
        mas_importance(net(), [x], forward=lambda m, b: (m(b).sum(0), None))


# ── losses and targets ──


@pytest.mark.parametrize(
    ("loss", "target", "error", "word"),
    [
        ("categorical", lambda y: y.double(), TypeError, "callable"),
        ("categorical", lambda y: y[:, None], ValueError, "shape"),
        ("categorical", lambda y: y + 1, ValueError, "class index"),
        ("categorical", lambda y: y - 1, ValueError, "class index"),
        ("categorical", lambda y: None, ValueError, "targets"),
        ("gaussian", lambda y: y.double(), ValueError, "broadcast"),
        ("gaussian", lambda y: y.double()[:, None], ValueError, "broadcast"),
        ("bernoulli", lambda y: y[:, None], ValueError, "broadcast"),
        ("bernoulli", lambda y: y[:, None].expand(-1, 3) - 0.5, ValueError, r"\[0, 1\]"),
        ("bernoulli", lambda y: y[:, None].expand(-1, 3) * float("nan"), ValueError, r"\[0, 1\]"),
    ],
)
def test_targets_that_do_not_fit(loss, target, error, word):
    x = xy(6)[0]
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(error, match=word):
        fisher_importance(net(), [(x, target(y))], loss=loss)


def test_a_bad_target_in_a_later_batch():
    x, y = xy()
    with pytest.raises(ValueError, match="class index"):
        fisher_importance(net(), [(x, y), (x, y + 3)])


def test_class_dimension_must_be_last():
    model = nn.Conv1d(2, 3, 1)
    with pytest.raises(ValueError, match="forward"):
        fisher_importance(model, [(torch.randn(2, 2, 5), torch.zeros(2, 5, dtype=torch.long))])
    with pytest.raises(ValueError, match="bernoulli"):
        fisher_importance(nn.Linear(2, 1), [(torch.randn(2, 2), torch.zeros(2, dtype=torch.long))])


@pytest.mark.parametrize("labels", ["dataset", "predicted", "sampled", "expected"])
def test_class_dimension_must_be_last_whatever_the_labels(labels):
    data = [(torch.randn(2, 2, 4), torch.zeros(2, 4, dtype=torch.long))]
    with pytest.raises(ValueError, match="forward"):
        fisher_importance(nn.Conv1d(2, 3, 1), data, labels=labels)
    if labels != "dataset":
        assert fisher_importance(nn.Conv1d(2, 3, 1), [data[0][0]], labels=labels).num_samples == 2


@pytest.mark.parametrize("loss", ["categorical", "gaussian"])
def test_an_unsigned_156_is_a_label(loss):
    # In eight bits −100 is 156.
    model, x = nn.Linear(4, 300).double(), xy()[0]
    y = torch.full((6,) if loss == "categorical" else (6, 300), 156)
    wanted = fisher_importance(model, [(x, y)], loss)
    assert wanted["bias"].count_nonzero()
    same(fisher_importance(model, [(x, y.to(torch.uint8))], loss), wanted)


def test_an_unsigned_156_is_a_label_for_mas_and_signal():
    x = torch.randn(2, 156, 4, dtype=torch.float64)
    y = torch.full((2, 156), 156, dtype=torch.uint8)
    for importance in (mas_importance, signal_importance):
        same(importance(net(), [(x, y)]), importance(net(), [x]))
        same(importance(net(), [(x[:, 0], y[:, 0])]), importance(net(), [x[:, 0]]))


def test_a_mapping_of_the_users_own_is_not_touched():
    class Record(collections.abc.MutableMapping):
        def __init__(self, **parts):
            self.parts = parts

        def __getitem__(self, key):
            return self.parts[key]

        def __setitem__(self, key, value):
            self.parts[key] = value

        def __delitem__(self, key):
            del self.parts[key]

        def __iter__(self):
            return iter(self.parts)

        def __len__(self):
            return len(self.parts)

    x, y = xy()
    batch = Record(input=x, labels=y)
    same(fisher_importance(net(), [batch]), fisher_importance(net(), [(x, y)]))
    assert batch["input"] is x
    ordered = collections.OrderedDict(input=x, labels=y)
    kinds = set()
    fisher_importance(net(), [ordered], forward=lambda m, b: (kinds.add(type(b)) or m(b["input"]), b["labels"]))
    assert kinds == {collections.OrderedDict}


def test_attention_mask_masks_positions_never_entries():
    class Model(nn.Linear):
        def forward(self, input, attention_mask):
            return super().forward(input)

    torch.manual_seed(0)
    model, x = Model(5, 5).double(), torch.randn(2, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    for options in ({"loss": "bernoulli", "labels": "expected"}, {"loss": "gaussian", "labels": "expected"}):
        wanted = fisher_importance(model, [{"input": x, "attention_mask": torch.ones_like(mask)}], **options)
        same(fisher_importance(model, [{"input": x, "attention_mask": mask}], **options), wanted)
        wide = {"input": x[:, None].expand(2, 5, 5), "attention_mask": mask}
        keep = mask.double().sum() / 2
        got = fisher_importance(model, [wide], loss="gaussian", labels="expected")
        near(got["bias"], torch.ones(5).double() * keep)


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (lambda out, y: out.sum(), 'reduction="none"'),
        (lambda out, y: out.sum(1, keepdim=True), r"shape \[\d\], got \["),
        (lambda out, y: out, r"shape \[\d\], got \["),
        (lambda out, y: out.mean().reshape(1), r"shape \[\d\], got \["),
    ],
)
def test_callable_loss_must_be_per_sample(loss, word):
    with pytest.raises(ValueError, match=word):
        fisher_importance(net(), [xy()], loss=loss)


def test_losses_that_carry_no_gradient():
    with pytest.raises(TypeError, match="tensor"):
        fisher_importance(net(), [xy()], loss=lambda out, y: 1.0)
    with pytest.raises(ValueError, match="detached"):
        fisher_importance(net(), [xy()], loss=lambda out, y: out.detach().sum(1))
    with pytest.raises(ValueError, match="detached"):
        mas_importance(net(), [xy()[0]], forward=lambda m, b: (m(b).detach(), None))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"loss": "mse"}, "gaussian"),
        ({"labels": "true"}, "dataset"),
        ({"loss": "gaussian", "labels": "predicted"}, "identically zero"),
        ({"loss": lambda o, y: o.sum(1), "labels": "sampled"}, "named loss"),
    ],
)
def test_bad_loss_or_labels(options, word):
    with pytest.raises(ValueError, match=word):
        fisher_importance(net(), [xy()], **options)


# ── options ──


@each_pass
def test_impl_and_verify(importance):
    same(importance(net(), [xy()], impl="reference"), importance(net(), [xy()], impl="auto"))
    with pytest.raises(NotImplementedError, match="sum_grad_power"):
        importance(net(), [xy()], impl="triton")  # for CUDA tensors
    with pytest.raises(ValueError, match="impl"):
        importance(net(), [xy()], impl="fast")
    same(importance(net(), [xy()], verify=True), importance(net(), [xy()]))


def test_verify_draws_nothing_of_its_own():
    def sampled(**options):
        generator = torch.Generator().manual_seed(3)
        return fisher_importance(net(), [xy()], labels="sampled", generator=generator, **options)

    assert all(torch.equal(value, sampled()[name]) for name, value in sampled(verify=True).items())


def test_verify_finds_what_shapes_do_not_show():
    """Outputs stay apart, but a custom backward hands the gradient of one sample to another."""

    class Swap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g.flip(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return Swap.apply(self.net(x))

    fisher_importance(Model(), [xy()])
    with pytest.raises(RuntimeError, match=r"net\.0\.weight"):
        fisher_importance(Model(), [xy()], verify=True)


@each_pass
def test_options_of_the_wrong_type(importance):
    for options in ({"forward": 3}, {"generator": 3}, {"batch_dim": "0"}, {"process_group": True}, {"exclude": [3]}):
        with pytest.raises(TypeError):
            importance(net(), [xy()], **options)
    with pytest.raises(ValueError, match="batch_dim"):
        importance(net(), [xy()], batch_dim=-1)
    with pytest.raises(TypeError, match="Module"):
        importance(lambda x: x, [xy()])


@each_pass
def test_exclude(importance):
    whole = importance(net(), [xy()])
    part = importance(net(), [xy()], exclude="*.bias")
    assert list(part) == ["0.weight", "2.weight"]
    assert all(torch.equal(part[name], whole[name]) for name in part)
    with pytest.raises(ValueError, match="nope"):
        importance(net(), [xy()], exclude=("*.bias", "nope"))
    with pytest.raises(ValueError, match="no trainable parameter"):
        importance(net(), [xy()], exclude="*")
    with pytest.raises(ValueError, match="no trainable parameter"):
        importance(net().requires_grad_(False), [xy()])
    frozen = net()
    frozen[0].requires_grad_(False)
    assert list(importance(frozen, [xy()], exclude="0.*")) == ["2.weight", "2.bias"]


@each_pass
def test_progress(importance, capsys, monkeypatch):
    got = importance(net(), [xy()], progress=True)
    assert "6" in capsys.readouterr().err
    same(got, importance(net(), [xy()]))
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"fastewc\[progress\]"):
        importance(net(), [xy()], progress=True)


# ── models that are refused ──


@each_pass
def test_batchnorm(importance):
    def model(**options):
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False, **options), nn.Linear(5, 3)).double()

    with pytest.raises(ValueError, match=r"eval\(\)"):
        importance(model(), [xy()])
    with pytest.raises(ValueError, match="running statistics"):
        importance(model(track_running_stats=False).eval(), [xy()])
    assert importance(model().eval(), [xy()]).num_samples == 6


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(nn.functional.dropout(x, 0.5, self.training))


@each_pass
@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.3), FunctionalDropout(), nn.RReLU(0.1, 0.9)], ids=lambda m: type(m).__name__
)
def test_active_dropout(importance, layer):
    model = (
        layer
        if isinstance(layer, FunctionalDropout)
        else nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).double()
    )
    model.train()
    with pytest.raises(ValueError, match="allow_dropout"):
        importance(model, [xy()])
    assert importance(model, [xy()], allow_dropout=True).num_samples == 6
    model.eval()
    assert importance(model, [xy()]).num_samples == 6


def test_dropout_inside_recurrent_and_attention_layers():
    x = torch.randn(2, 3, 4)
    for layer in (nn.LSTM(4, 4, 2, dropout=0.5), nn.TransformerEncoderLayer(4, 2, 8)):
        model = nn.ModuleList([layer]).train()
        with pytest.raises(ValueError, match="allow_dropout"):
            mas_importance(model, [x], forward=lambda m, b: (m[0](b), None))
    assert mas_importance(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)).train(), [x]).num_samples == 2


def test_lazy_and_complex_parameters():
    with pytest.raises(ValueError, match="lazy"):
        mas_importance(nn.LazyLinear(3), [torch.ones(1, 2)])
    with pytest.raises(NotImplementedError, match="complex"):
        mas_importance(nn.Linear(2, 2, dtype=torch.complex64), [torch.ones(1, 2)])


# ── what is left as it was ──


@each_pass
def test_state_is_untouched(importance):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.full((4,), float("nan"), dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            self.last = x[0]
            return self.net(x)

    model, (x, y) = Counting(), xy()
    model.net[0].train()
    model.net[0].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    grads = {p: p.grad for p in model.parameters()}
    modes = [m.training for m in model.modules()]
    fired = []
    handle = model.net[0].weight.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    torch.manual_seed(3)
    rng, buffers = torch.get_rng_state(), dict(model.named_buffers())
    x.requires_grad_()
    importance(model, DataLoader(TensorDataset(x.detach(), y), batch_size=2, shuffle=True))
    importance(model, [(x, y)])
    assert torch.equal(torch.get_rng_state(), rng)
    assert x.grad is None
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is grad and (grad is None or bool((grad == 1).all())) for p, grad in grads.items())
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())
    assert model.calls.item() == 0
    assert bool(model.last.isnan().all())
    assert not fired
    handle.remove()


@each_pass
def test_state_is_untouched_after_an_error(importance):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            torch.rand(1)
            if bool(x.isnan().any()):
                raise RuntimeError("broken")
            return self.net(x)

    model, rng = Failing(), torch.get_rng_state()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="broken"):
        importance(model, [xy(), xy(), (xy()[0] * math.nan, xy()[1])], allow_dropout=True)
    assert model.calls.item() == 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("checkpointed", [False, "model", "critic"])
def test_a_critic_keeps_its_gradients(checkpointed):
    generator, critic = net(), nn.Linear(3, 1).double()
    grads = {p: torch.full_like(p, 7.0) for p in critic.parameters()}
    for p, grad in grads.items():
        p.grad = grad

    def forward(model, batch):
        first, last = model, critic
        if checkpointed == "model":
            first = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False)
        if checkpointed == "critic":
            last = functools.partial(torch.utils.checkpoint.checkpoint, critic, use_reentrant=False)
        return last(first(batch)), None

    got = mas_importance(generator, [xy()[0]], forward=forward)
    assert list(got) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(value.count_nonzero() for value in got.values())
    assert all(p.grad is grad and bool((grad == 7).all()) for p, grad in grads.items())
    assert all(p.grad is None for p in generator.parameters())


def test_reentrant_checkpoint_of_a_critic_is_refused():
    # The critic's parameters are not in the graph of the output, so their .grad could not be put back.
    model, critic = net(), nn.Linear(3, 1).double()

    def forward(m, x):
        return torch.utils.checkpoint.checkpoint(critic, m(x), use_reentrant=True), None

    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        mas_importance(model, [xy()[0]], forward=forward)
    assert critic.weight.grad is None


def test_reentrant_checkpoint_with_an_optimizer_in_backward_is_refused():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return self[2](torch.utils.checkpoint.checkpoint(self[1], self[0](x), use_reentrant=True))

    model = Checkpointed(*net())
    same(mas_importance(model, [xy()[0]]), mas_importance(net(), [xy()[0]]))
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        mas_importance(model, [xy()[0]])
    assert model[0].weight.count_nonzero() == 20
    handle.remove()


def test_gradient_hooks_are_refused():
    model = net()
    handle = model[0].weight.register_hook(lambda grad: grad * 0)
    for importance in (fisher_importance, mas_importance):
        with pytest.raises(ValueError, match=r"'0\.weight'"):
            importance(model, [xy()])
        assert importance(model, [xy()], exclude="0.weight").num_samples == 6
    assert signal_importance(model, [xy()]).num_samples == 6
    handle.remove()


@each_pass
def test_a_buffer_that_was_none_is_none_again(importance):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.register_buffer("seen", None)

        def forward(self, x):
            self.seen = x
            return self.net(x)

    model = Lazy()
    importance(model, [xy()])
    assert model.seen is None
    assert "seen" in model._buffers


# ── forwards that write into their parameters ──


class Writing(nn.Module):
    """The forward brings the weights where they should be, and keeps them there."""

    def __init__(self, how):
        super().__init__()
        self.table, self.out, self.how = nn.Embedding(9, 4), nn.Linear(4, 9), how
        if how == "max_norm":
            self.table.max_norm = 0.5
            self.out.weight = self.table.weight

    def forward(self, ids):
        if self.how == "no_grad":
            with torch.no_grad():
                self.out.weight.clamp_(-0.2, 0.2)
        if self.how == "data":
            self.out.weight.data.clamp_(-0.2, 0.2)
        if self.how == "frozen":
            self.table.weight.detach().clamp_(-0.2, 0.2)
        return self.out(self.table(ids).tanh().sum(1))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("how", ["max_norm", "no_grad", "data", "frozen"])
def test_a_forward_that_changes_its_parameters_is_refused(how, impl):
    torch.manual_seed(0)
    model, ids = Writing(how).double().eval(), torch.arange(9).view(3, 3)
    if how == "frozen":
        model.table.requires_grad_(False)
    name = "table" if how in ("max_norm", "frozen") else "out"
    # At the first batch, and at a later one.
    for data in ([(ids,)], [(ids[:1],), (ids[1:],)]) if how == "max_norm" else ([(ids,)],):
        with pytest.raises(ValueError, match=f"the forward changes '{name}.weight'"):
            mas_importance(model, data, impl=impl)
        nn.init.normal_(model.table.weight)
    model(ids)
    same(mas_importance(model, [(ids,)], impl=impl), mas_importance(model, [(ids[i : i + 1],) for i in range(3)]))


def test_a_forward_that_changes_its_parameters_is_refused_by_signal():
    model = Writing("no_grad").eval()
    with pytest.raises(ValueError, match=r"the forward changes 'out.weight'"):
        signal_importance(model, [(torch.arange(9).view(3, 3),)], exclude="table.*")


# ── forwards that mix samples ──


class Standardised(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net, self.dim = net(), dim

    def forward(self, x):
        hidden = self.net[1](self.net[0](x))
        mean, std = hidden.mean(self.dim, keepdim=True), hidden.std(self.dim, keepdim=True, correction=0)
        return self.net[2]((hidden - mean) / (std + 1e-3))


@each_pass
def test_a_forward_that_mixes_samples_is_refused(importance):
    with pytest.raises(ValueError, match=r"mixes samples.*statistics"):
        importance(Standardised(0), [xy()])
    x, y = xy()
    assert importance(Standardised(0), [(x[i : i + 1], y[i : i + 1]) for i in range(6)]).num_samples == 6
    assert importance(Standardised(0), [xy()], allow_dropout=True).num_samples == 6
    assert importance(Standardised(1), [xy()]).num_samples == 6

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lin = nn.Conv1d(1, 5, 2), nn.Linear(5, 3)

        def forward(self, x):
            h = nn.functional.batch_norm(self.conv(x[:, None].float()), None, None, training=True)
            return self.lin(h.relu().mean(-1))

    with pytest.raises(ValueError, match="mixes samples"):
        importance(Functional().eval(), [xy()])


class Meeting(nn.Module):
    """Samples that meet each other, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.one, self.other, self.how = nn.Linear(4, 5), nn.Linear(4, 5), how

    def forward(self, x):
        one, other = self.one(x), self.other(x)
        if self.how == "product":  # of every sample with every other, as where images meet their captions
            return one @ other.T
        if self.how == "distance":
            return torch.cdist(one, other)
        if self.how == "largest":  # as of numbers that are quantised together; here no other of the first two
            return one / one.abs().max()
        return one + 0.02 * other.mean(0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("how", ["product", "distance", "largest", "mean at the side"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_that_meet_are_refused(how, dtype, impl):
    torch.manual_seed(0)
    model, x = Meeting(how).to(dtype).eval(), torch.randn(6, 4, dtype=dtype)
    x[0], x[1], x[4] = 2 * x[0], x[1] / 9, 100 * x[4]
    with pytest.raises(ValueError, match="mixes samples"):
        mas_importance(model, [(x,)], impl=impl)
    single = mas_importance(model, [(one,) for one in x.split(1)], impl=impl)  # what a loader of single samples gives
    same(single, mas_importance(model, [(one,) for one in x.split(1)], impl="reference"), roundings=2000)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_loss_that_compares_samples_is_refused(impl):
    def contrast(output, target):
        return nn.functional.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none")

    with pytest.raises(ValueError, match="mixes samples"):
        fisher_importance(net(), [xy()], loss=contrast, impl=impl)


@each_pass
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_roundings_of_other_batch_sizes_are_not_mixing(importance, dtype):
    layers = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(64, 3)).eval().to(dtype)
    x, y = torch.randn(17, 64).to(dtype), torch.randint(0, 3, (17,))
    assert importance(model, [(x, y)]).num_samples == 17
    with torch.autocast("cpu", torch.bfloat16):
        assert importance(model, [(x, y)], max_samples=16).num_samples == 16


def test_padded_batches_are_not_mixing():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    lengths = torch.tensor([3, 5, 1])
    x, padding = torch.randn(3, 5, 4), torch.arange(5) >= lengths[:, None]

    def forward(m, batch):
        return m(batch[0], src_key_padding_mask=batch[1]), None

    def trimmed(m, batch):  # to the longest of the batch: another shape alone
        longest = int((~batch[1]).sum(1).max())
        return m(batch[0][:, :longest], src_key_padding_mask=batch[1][:, :longest]), None

    for call in (forward, trimmed):
        assert mas_importance(model, [(x, padding)], forward=call).num_samples == 3


@each_pass
def test_works_inside_no_grad_and_inference_mode(importance):
    wanted = importance(net(), [xy()])

    def leaky():
        with torch.no_grad():
            yield xy()

    for guard in (torch.no_grad, torch.inference_mode):
        model = net()
        with guard():
            got = importance(model, [xy()])
            from_generator = importance(model, leaky())
            assert not torch.is_grad_enabled()
        same(got, wanted)
        same(from_generator, wanted)
        assert all(not value.is_inference() for value in got.values())


def test_autocast_of_the_caller_stays_on():
    model, (x, y) = net().float(), xy()
    x = x.float()
    kinds = set()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(x)  # caches casts of the weights that carry no graph
        got = fisher_importance(model, [(x, y)], forward=lambda m, b: (kinds.add(m(b[0]).dtype) or m(b[0]), b[1]))
    assert kinds == {torch.bfloat16}
    assert all(value.count_nonzero() for value in got.values())


# ── wrappers ──


@each_pass
def test_compiled_and_data_parallel_models(importance):
    wanted = importance(net(), [xy()])
    same(importance(torch.compile(net(), backend="eager"), [xy()]), wanted)
    same(importance(nn.DataParallel(net()), [xy()]), wanted)
    inner = net()
    inner[0] = torch.compile(inner[0], backend="eager")
    same(importance(inner, [xy()]), wanted)
    assert fastewc.Importance is type(wanted)


def test_cut_of_time_major_batches_by_max_samples():
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (5, 4))
    got = fisher_importance(net(), [(x, y)], batch_dim=1, max_samples=3)
    same(got, fisher_importance(net(), [(x[:, :3].transpose(0, 1), y[:, :3].T)]))
    assert got.num_samples == 3


@pytest.mark.parametrize("importance", [fisher_importance, mas_importance])
def test_batches_of_one_sample_are_joined(importance):
    x, y = xy()
    got = importance(net(), [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    same(got, importance(net(), [(x, y)]))
    assert {path for path, _ in got.report.values()} == {"fused"}


def test_batches_of_one_sample_are_not_joined_where_the_forward_would_mix_them():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x - 0.5 * x.mean(0))

    x, y = xy()
    got = fisher_importance(Mixing(), [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    same(got.rename({n: n[4:] for n in got}), fisher_importance(net(), [(x / 2, y)]))
    assert {path for path, _ in got.report.values()} == {"batch-1"}


@pytest.mark.parametrize("custom", [False, True], ids=["model", "forward"])
def test_a_forward_that_takes_one_sample_at_a_time_gets_them_so(custom):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            assert len(x) == 1, "one sample at a time"
            return self.net(x)

    x, y = xy()
    own = {"forward": lambda model, batch: (model(batch[0]), batch[1])} if custom else {}
    got = fisher_importance(Single(), [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))], **own)
    same(got.rename({n: n[4:] for n in got}), fisher_importance(net(), [(x, y)]))
    assert {path for path, _ in got.report.values()} == {"batch-1"}
    with pytest.raises(AssertionError, match="one sample at a time"):
        fisher_importance(Single(), [(x, y)], **own)


def test_batches_for_a_forward_are_joined():
    sizes = []

    def forward(model, batch):
        sizes.append(len(batch["x"]))
        return model(batch["x"]), batch["y"]

    x, y = xy(12)
    data = [{"x": x[i : i + 2], "y": y[i : i + 2]} for i in range(0, 12, 2)]
    same(fisher_importance(net(), data, forward=forward), fisher_importance(net(), [(x, y)]))
    assert max(sizes) > 2
