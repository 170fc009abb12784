"""Packed sequences: recurrent layers take them by rules; what is done with packed rows goes sample by sample."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from fastewc import fisher_importance, mas_importance
from fastewc.per_sample.unrolled import Steps, of_packed
from tests.per_sample.checking import Lambda, assert_exact, assert_importance, naive, paths, scales_of

STEPS = 6
MIXED, SORTED = (2, 5, 1, 6, 3, 3), (6, 5, 3, 3, 2, 1)


def samples(*lengths):
    """[N, T, 4]; how long a sample is, its first number says."""
    x = torch.randn(len(lengths), STEPS, 4, dtype=torch.float64)
    x[:, 0, 0] = torch.tensor(lengths)
    return x


def lengths_of(x):
    return x[:, 0, 0].long()


def packed(x, entries=None):
    return pack_padded_sequence(x if entries is None else entries, lengths_of(x), True, enforce_sorted=False)


def last(state):
    """[N, ...]: of the last layer, whether c_n comes with h_n or not."""
    return (state[0] if isinstance(state, tuple) else state)[-1]


def by(layer, size, take=None, **parts):
    def forward(model, x):
        return model.out(last(model.rnn(packed(x))[1]) if take is None else take(model, x))

    return Lambda(forward, rnn=layer, out=nn.Linear(size, 2), **parts).double().eval()


def both_states(model, x):
    (h, c) = model.rnn(packed(x))[1]
    return torch.cat([*h, *c], -1)


def in_order(model, x):
    return last(model.rnn(pack_padded_sequence(x.transpose(0, 1), lengths_of(x)))[1])


def of_a_list(model, x):
    some = [one[:n] for one, n in zip(x, lengths_of(x).tolist(), strict=True)]
    return last(model.rnn(pack_sequence(some, enforce_sorted=False))[1])


def given(model, x):
    h = x[:, 0, :3].unsqueeze(0).contiguous()
    return last(model.rnn(packed(x), (h, h.cos()) if isinstance(model.rnn, nn.LSTM) else h)[1])


def stacked(model, x):
    found, _ = model.below(packed(x))
    return last(model.rnn(found._replace(data=found.data.tanh()))[1])


def twice(model, x):
    """The same layer for two sequences of a sample, each with an order of its own."""
    other = x.cos()
    other[:, 0, 0] = STEPS + 1 - x[:, 0, 0]
    return last(model.rnn(packed(x))[1]) * last(model.rnn(input=packed(other))[1])


def checkpointed(model, x):
    return checkpoint(lambda x: last(model.rnn(packed(x))[1]), x, use_reentrant=False)


def after_a_layer(model, x):
    return last(model.rnn(packed(x, model.pre(x)))[1])


def tied():
    model = by(nn.RNN(4, 4), 4, after_a_layer, pre=nn.Linear(4, 4))
    model.pre.weight = model.rnn.weight_hh_l0
    return model


FORMS = {
    "lstm": lambda: by(nn.LSTM(4, 3), 3),
    "gru": lambda: by(nn.GRU(4, 3), 3),
    "tanh": lambda: by(nn.RNN(4, 3), 3),
    "relu": lambda: by(nn.RNN(4, 3, nonlinearity="relu"), 3),
    "deep lstm": lambda: by(nn.LSTM(4, 3, num_layers=2, bidirectional=True), 24, both_states),
    "deep gru": lambda: by(nn.GRU(4, 3, num_layers=2, bidirectional=True), 3),
    "no bias": lambda: by(nn.LSTM(4, 3, bias=False), 3),
    "projected": lambda: by(nn.LSTM(4, 5, num_layers=2, proj_size=2), 2),
    "projected both ways": lambda: by(nn.LSTM(4, 5, proj_size=2, bias=False, bidirectional=True), 2),
    "a list": lambda: by(nn.GRU(4, 3), 3, of_a_list),
    "a state of each sample, lstm": lambda: by(nn.LSTM(4, 3), 3, given),
    "a state of each sample, gru": lambda: by(nn.GRU(4, 3), 3, given),
    "stacked": lambda: by(nn.LSTM(3, 3), 3, stacked, below=nn.GRU(4, 3)),
    "twice": lambda: by(nn.GRU(4, 3), 3, twice),
    "checkpointed": lambda: by(nn.LSTM(4, 3, bidirectional=True), 3, checkpointed),
    "tied": tied,
}  # fmt: skip


@pytest.mark.parametrize("lengths", [MIXED, SORTED, (4,) * 6, (1,) * 6], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_layers_take_rules(name, lengths):
    assert_exact(FORMS[name](), samples(*lengths))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_samples_that_are_sorted_already(layer):
    assert_exact(by(layer(4, 3), 3, in_order), samples(*SORTED))


@pytest.mark.parametrize(
    "others", [(MIXED, (1, 2, 1)), ((1, 1), MIXED), ((2, 1), (4, 6, 5), (1, 1), (3, 1))], ids=["short", "long", "both"]
)
def test_lengths_that_change_from_batch_to_batch(others):
    model, x = by(nn.LSTM(4, 3, num_layers=2, bidirectional=True), 3), [samples(*some) for some in others]
    got, whole = mas_importance(model, [(some,) for some in x]), torch.cat(x)
    oracle = naive(model, lambda i: [(1.0, model(whole[i : i + 1]).square().sum())], len(whole), power=1)
    assert_importance(got, oracle, 4000.0, scales=scales_of(oracle, 1))
    assert paths(got)["fused"] == set(got)


# ── packed rows ──

OUT = {"out.weight", "out.bias"}


def padded_again(model, x):
    return pad_packed_sequence(model.rnn(packed(x))[0], True, total_length=STEPS)[0]


def of_rows(model, x):
    found, _ = model.rnn(packed(x))
    return pad_packed_sequence(found._replace(data=model.out(found.data)), True, total_length=STEPS)[0].cumsum(1)


def ordered_rows(model, x):
    found, _ = model.rnn(pack_padded_sequence(x, lengths_of(x), True))
    return pad_packed_sequence(found._replace(data=model.out(found.data)), True, total_length=STEPS)[0]


def test_a_layer_behind_padding():
    assert_exact(by(nn.LSTM(4, 3, bidirectional=True), 6, padded_again), samples(*MIXED), slow=OUT)


def test_a_layer_behind_padding_of_samples_that_are_sorted_already():
    def take(model, x):
        found, _ = model.rnn(pack_padded_sequence(x, lengths_of(x), True))
        return pad_packed_sequence(found, True, total_length=STEPS)[0]

    assert_exact(by(nn.LSTM(4, 3), 3, take), samples(*SORTED))


@pytest.mark.parametrize("lengths", [MIXED, (4,) * 6], ids=str)
def test_a_layer_of_packed_rows(lengths):
    model = Lambda(of_rows, rnn=nn.GRU(4, 3), out=nn.Linear(3, 2)).double().eval()
    assert_exact(model, samples(*lengths), slow=OUT)


def test_rows_whose_number_fits_by_chance():
    """Of two samples as long as each other, packed rows look regular, and 10 rows of 5 samples like 2 of each."""
    model = Lambda(ordered_rows, rnn=nn.GRU(4, 3), out=nn.Linear(3, 2)).double().eval()
    assert_exact(model, samples(3, 3, 2, 1, 1), slow=OUT, cuts=((),))


def embedded(model, x):
    found = packed(x)
    return last(model.rnn(found._replace(data=model.pre(found.data)))[1])


def test_rows_that_a_layer_made_are_taken_apart():
    model = by(nn.LSTM(3, 3), 3, embedded, pre=nn.Linear(4, 3))
    assert_exact(model, samples(*MIXED), slow={"pre.weight", "pre.bias"})


def sorted_by_hand(model, x):
    """Only the samples' numbers are in another order, as they were before torch did it."""
    order = lengths_of(x).argsort(descending=True)
    h = last(model.rnn(pack_padded_sequence(model.pre(x)[order], lengths_of(x)[order], True))[1])
    return h[order.argsort()]


def sorted_twice(model, x):
    order = lengths_of(x).argsort()
    h = last(model.rnn(packed(x[order], model.pre(x)[order]))[1])
    return h[order.argsort()]


@pytest.mark.parametrize("lengths", [MIXED, SORTED], ids=str)
@pytest.mark.parametrize("take", [sorted_by_hand, sorted_twice])
def test_samples_in_an_order_of_the_models_own(take, lengths):
    model = by(nn.RNN(4, 4), 4, take, pre=nn.Linear(4, 4))
    model.pre.weight = model.rnn.weight_hh_l0
    own = {f"rnn.{name}" for name, _ in model.rnn.named_parameters()}
    assert_exact(model, samples(*lengths), slow=own | OUT)


# ── which layers ──


def test_a_frozen_layer():
    model = by(nn.LSTM(4, 3), 3)
    model.rnn.requires_grad_(False)
    assert_exact(model, samples(*MIXED))


def test_weights_made_of_others():
    model = by(weight_norm(nn.LSTM(4, 3).double(), "weight_hh_l0"), 3)
    made = {f"rnn.parametrizations.weight_hh_l0.original{n}" for n in (0, 1)}
    assert_exact(model, samples(*MIXED), op=made)


class Own(nn.GRU):
    """Says itself what it does."""

    def forward(self, x, scale):
        return super().forward(x)[1] * scale


def test_a_forward_of_its_own():
    model = by(Own(4, 3), 3, lambda model, x: model.rnn(packed(x), 2.0)[-1])
    slow = {f"rnn.{name}" for name, _ in model.rnn.named_parameters()} | OUT
    assert_exact(model, samples(*MIXED), slow=slow)


def test_a_layer_is_itself_again():
    model, x = by(nn.LSTM(4, 3), 3), samples(*MIXED)
    before = list(model.rnn._flat_weights)
    fisher_importance(model, [(x, torch.zeros(6, 2).double())], loss="gaussian")
    assert "forward" not in vars(model.rnn)
    assert all(a is b for a, b in zip(model.rnn._flat_weights, before, strict=True))


# ── the function ──

KINDS = {
    "lstm": nn.LSTM,
    "projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


@pytest.mark.parametrize("lengths", [MIXED, SORTED, (1,) * 6], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gives_what_torch_gives(kind, lengths):
    x, steps = samples(*lengths), Steps(alike=False)
    for layers, both, bias, own in itertools.product((1, 2), *[(False, True)] * 3):
        dropout = 0.5 if layers > 1 else 0.0
        layer = KINDS[kind](4, 3, layers, bidirectional=both, bias=bias, dropout=dropout).double().eval()
        ordered = list(lengths) == sorted(lengths, reverse=True)
        given = pack_padded_sequence(x, lengths_of(x), True, enforce_sorted=ordered)
        states = [torch.randn_like(one) for one in flat(layer(given)[1])]
        hx = None if not own else tuple(states) if len(states) == 2 else states[0]
        (ours, last), (theirs, wanted) = of_packed(steps, layer, layer.forward, given, hx), layer(given, hx)
        assert isinstance(ours, PackedSequence)
        assert ours.sorted_indices is given.sorted_indices
        assert ours.batch_sizes is given.batch_sizes
        for one, other in zip((ours.data, *flat(last)), (theirs.data, *flat(wanted)), strict=True):
            torch.testing.assert_close(one, other)


def flat(state):
    return state if isinstance(state, tuple) else (state,)


def test_a_state_that_does_not_fit_is_refused_as_by_torch():
    layer, x = nn.GRU(4, 3).double(), packed(samples(*MIXED))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        of_packed(Steps(alike=False), layer, layer.forward, x, torch.zeros(1, 1, 3).double())
