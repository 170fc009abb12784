"""Recurrent layers: exact, and by rules, as the linear layers that they consist of."""

import copy

import pytest
import torch
from torch import nn

from fastewc import fisher_importance, mas_importance
from fastewc.per_sample.unrolled import unrolled
from tests.per_sample.checking import Lambda, assert_exact, floats, weight

STEPS = floats(6, 5, 4)
BEHIND = {"batch_first": True}


def by(layer, size, *, state=None, take=lambda found: found[0], **parts):
    def forward(model, x):
        found = model.rnn(x) if state is None else model.rnn(x, state(model, x))
        return model.out(take(found))

    return Lambda(forward, rnn=layer, out=nn.Linear(size, 2), **parts).double().eval()


def of_time(model, x):
    return model.out(model.rnn(x.transpose(0, 1))[0]).transpose(0, 1)


def learned(model, x):
    h = model.h.expand(-1, len(x), -1).contiguous()
    return (h, torch.tanh(h)) if isinstance(model.rnn, nn.LSTM) else h


def given(model, x):
    return x[:, 0, :3].unsqueeze(0).contiguous()


LAYERS = {
    "lstm": lambda: by(nn.LSTM(4, 3, **BEHIND), 3),
    "gru": lambda: by(nn.GRU(4, 3, **BEHIND), 3),
    "tanh": lambda: by(nn.RNN(4, 3, **BEHIND), 3),
    "relu": lambda: by(nn.RNN(4, 3, nonlinearity="relu", **BEHIND), 3),
    "deep lstm": lambda: by(nn.LSTM(4, 3, num_layers=2, bidirectional=True, **BEHIND), 6),
    "deep gru": lambda: by(nn.GRU(4, 3, num_layers=3, bidirectional=True, **BEHIND), 6),
    "no bias": lambda: by(nn.LSTM(4, 3, bias=False, **BEHIND), 3),
    "projected": lambda: by(nn.LSTM(4, 5, num_layers=2, proj_size=2, **BEHIND), 2),
    "projected both ways": lambda: by(nn.LSTM(4, 5, proj_size=2, bias=False, bidirectional=True, **BEHIND), 4),
    "time first": lambda: Lambda(of_time, rnn=nn.GRU(4, 3), out=nn.Linear(3, 2)).double().eval(),
    "last states": lambda: by(nn.LSTM(4, 3, num_layers=2, **BEHIND), 3, take=lambda found: found[1][1][-1]),
    "a state of each sample": lambda: by(nn.GRU(4, 3, **BEHIND), 3, state=given),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_rules(name):
    assert_exact(LAYERS[name](), STEPS().double())


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_a_learned_first_state(layer):
    model = by(layer(4, 3, **BEHIND), 3, state=learned, h=weight(1, 1, 3))
    x = STEPS().double()
    got = mas_importance(model, [(x,)])
    assert all(path != "batch-1" for path, _ in got.report.values())
    assert_exact(model, x, op={n for n, (path, _) in got.report.items() if path == "op"})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cell, bias):
    def forward(model, x):
        state = None
        for step in x.unbind(1):
            state = model.cell(step, state)
        return model.out(state[0] if isinstance(state, tuple) else state)

    assert_exact(Lambda(forward, cell=cell(4, 3, bias=bias), out=nn.Linear(3, 2)).double().eval(), STEPS().double())


def test_frozen_weights_and_a_tie():
    model = by(nn.GRU(3, 3, **BEHIND), 3, take=lambda found: found[0], w=weight(9, 3))
    model.rnn.weight_hh_l0 = model.rnn.weight_ih_l0
    model.rnn.bias_ih_l0.requires_grad_(False)
    assert_exact(model, torch.randn(6, 5, 3).double(), unused={"w"})


def test_sequences_of_another_length_in_the_next_batch():
    model = by(nn.LSTM(4, 3, **BEHIND), 3, take=lambda found: found[0].sum(1))
    short, long = torch.randn(3, 1, 4).double(), torch.randn(3, 6, 4).double()
    got = mas_importance(model, [(short,), (long,)])
    alone = [mas_importance(model, [(x,)], impl="reference") for x in (short, long)]
    for name, value in got.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)


def test_the_layer_has_its_own_weights_again():
    model = by(nn.LSTM(4, 3, **BEHIND), 3)
    before = list(model.rnn._flat_weights)
    fisher_importance(model, [(STEPS().double(), torch.zeros(6, 5, 2).double())], loss="gaussian")
    assert all(a is b for a, b in zip(model.rnn._flat_weights, before, strict=True))
    copy.deepcopy(model)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_gives_what_torch_gives(name, train):
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, nn.RNN)
    options = {"nonlinearity": name[4:]} if kind is nn.RNN else {}
    layer, x = kind(4, 3, num_layers=2, bidirectional=True, **options).double(), torch.randn(5, 2, 4).double()
    state = torch.randn(4, 2, 3).double()
    args = (x, (state, state.cos()) if name == "lstm" else state, layer._flat_weights, True, 2, 0.0, train, True, False)
    for ours, theirs in zip(unrolled(getattr(torch, name), args)(*args), getattr(torch, name)(*args), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_between_layers_as_torch_does_it():
    layer, x = nn.GRU(4, 64, num_layers=2, dropout=0.5).double(), torch.randn(50, 1, 4).double()
    args = (x, torch.zeros(2, 1, 64).double(), layer._flat_weights, True, 2, 0.5, True, False, False)
    ours, theirs = (f(*args)[0].detach() for f in (unrolled(torch.gru, args), torch.gru))
    assert not torch.equal(ours, unrolled(torch.gru, args)(*args)[0])
    assert abs(ours.std() / theirs.std() - 1) < 0.1
