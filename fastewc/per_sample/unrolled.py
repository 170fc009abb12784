"""Recurrent layers as the functions that they consist of, so that the rules for those apply.

torch runs an LSTM, GRU or RNN as one function of all its weights. What it computes is a product with the input-hidden
weights at every position, and one with the hidden-hidden weights per position, which is a use of that weight for each:
written out, each is a linear layer as any other. Equations: torch.nn.LSTM, GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
#: (input's share of the gates, state, hidden-hidden weight, its bias) -> the next state, the hidden one first.
Cell = Callable[[Tensor, State, Tensor, Tensor | None], State]


def _lstm(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weight, bias)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    (h,) = state
    (r, z, n), (hidden_r, hidden_z, hidden_n) = gates.chunk(3, -1), F.linear(h, weight, bias).chunk(3, -1)
    z = (z + hidden_z).sigmoid()
    n = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
    return ((1 - z) * n + z * h,)


def _rnn(
    gates: Tensor, state: State, weight: Tensor, bias: Tensor | None, *, activation: Callable[[Tensor], Tensor]
) -> State:
    return (activation(gates + F.linear(state[0], weight, bias)),)


def _layers(
    cell: Cell, x: Tensor, hx: Tensor | Sequence[Tensor], weights: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(output, h_n) or (output, h_n, c_n)."""
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions = 2 if bidirectional else 1
    per = len(weights) // (num_layers * directions)  # an LSTM with proj_size has a projection behind the others
    projected = per > (4 if has_biases else 2)
    last: list[State] = []
    x = x.transpose(0, 1) if batch_first else x
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *rest = weights[k * per : (k + 1) * per]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            gates = F.linear(x, w_ih, b_ih).unbind(0)
            state = tuple(one[k] for one in states)
            found: list[Tensor] = []
            for t in range(len(gates)) if direction == 0 else reversed(range(len(gates))):
                state = cell(gates[t], state, w_hh, b_hh)
                if projected:
                    state = (F.linear(state[0], rest[-1]), *state[1:])
                found.append(state[0])
            outputs.append(torch.stack(found if direction == 0 else found[::-1]))
            last.append(state)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and train and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    output = x.transpose(0, 1) if batch_first else x
    return (output, *(torch.stack(one) for one in zip(*last, strict=True)))


def _one_step(
    cell: Cell, x: Tensor, hx: Tensor | Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    state = cell(F.linear(x, w_ih, b_ih), (hx,) if isinstance(hx, Tensor) else tuple(hx), w_hh, b_hh)
    return state[0] if isinstance(hx, Tensor) else state


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_rnn, activation=torch.tanh),
    "rnn_relu": partial(_rnn, activation=torch.relu),
}
_UNROLLED: dict[Any, Callable[..., Any]] = {
    **{getattr(torch, name): partial(_layers, cell) for name, cell in _CELLS.items()},
    **{getattr(torch, f"{name}_cell"): partial(_one_step, cell) for name, cell in _CELLS.items()},
}


def unrolled(func: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any] | None:
    """The same function in terms of linear layers; None for any other, and for packed sequences.

    A packed sequence has as many rows as its samples have positions together: whose a row is, no layout says.
    """
    packed = len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point()
    return None if packed else _UNROLLED.get(func)
