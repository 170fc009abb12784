"""Recurrent layers as the functions that they consist of, so that the rules for those apply.

torch runs an LSTM, GRU or RNN as one function of all its weights. What it computes is a product with the input-hidden
weights at every position, and one with the hidden-hidden weights per position, which is a use of that weight for each:
written out, each is a linear layer as any other. Equations: torch.nn.LSTM, GRU and RNN.

A packed sequence has as many rows as its samples have positions together, in an order in which every sample's place
depends on the others: whose a row is, no layout says. So these are padded, with the samples in the order in which they
came, and a sample's state stands still outside of its own positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

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
    dropout: float, train: bool, bidirectional: bool, batch_first: bool, live: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(output, h_n) or (output, h_n, c_n).

    ``live``: [T, N, 1], true for a sample's own positions. Outputs at others mean nothing, and have no gradient as long
    as nobody looks at them.
    """
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
                before, state = state, cell(gates[t], state, w_hh, b_hh)
                if projected:
                    state = (F.linear(state[0], rest[-1]), *state[1:])
                if live is not None:
                    state = tuple(torch.where(live[t], new, old) for new, old in zip(state, before, strict=True))
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
    """The same function in terms of linear layers; None for any other, and for packed sequences, see above."""
    packed = len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point()
    return None if packed else _UNROLLED.get(func)


@dataclass
class Steps:
    """How many steps packed sequences are padded to.

    Two at least: a weight that is used once when watched could be used no more often later. With ``alike`` as many as
    any before, so that other samples are taken through as many.
    """

    alike: bool
    most: int = 2

    def at_least(self, needed: int) -> int:
        """For sequences of which the longest needs so many."""
        steps = max(self.most, needed)
        if self.alike:
            self.most = steps
        return steps


def takes_packed(module: nn.Module) -> bool:
    """True for a layer of torch whose forward on a packed sequence is that of :func:`of_packed`."""
    return type(module).forward in (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


def of_packed(
    steps: Steps, module: nn.RNNBase, forward: Callable[..., Any], /, input: Tensor | PackedSequence, hx: Any = None
) -> Any:
    """In place of a layer's ``forward``: the same result, for a packed sequence in terms of linear layers."""
    if not isinstance(input, PackedSequence):
        return forward(input, hx)
    data, sizes, order, _ = input
    N, D = int(sizes[0]), 2 if module.bidirectional else 1
    T = steps.at_least(len(sizes))
    zeros = partial(torch.zeros, dtype=data.dtype, device=data.device)  # not made of data, which is in another order
    if hx is None:
        widths = (module.proj_size or module.hidden_size, module.hidden_size)
        states = tuple(zeros(module.num_layers * D, N, width) for width in widths)
        hx = states if module.mode == "LSTM" else states[0]
    module.check_forward_args(data, hx, sizes)
    places = _places(sizes, order, len(data), data.device)
    x, live = (
        zeros(T * N, rows.shape[1]).index_copy(0, places, rows).view(T, N, -1)
        for rows in (data, torch.ones_like(data[:, :1]))
    )
    weights = [weight for some in module.all_weights for weight in some]
    output, *last = _layers(
        _CELLS[module.mode.lower()], x, hx, weights, module.bias, module.num_layers, module.dropout, module.training,
        module.bidirectional, False, live > 0,
    )  # fmt: skip
    found = input._replace(data=output.flatten(0, 1).index_select(0, places))
    return found, tuple(last) if module.mode == "LSTM" else last[0]


def _places(sizes: Tensor, order: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """[rows]: where each row of packed data goes in [T * N], samples as they came; ``sizes`` [T], ``order`` [N].

    Made of these two by functions alone, such that it is known to undo them, and nothing else.
    """
    row, ends = torch.arange(rows, device=sizes.device), sizes.cumsum(0)
    step = torch.searchsorted(ends, row, right=True)
    sample = (row - (ends - sizes)[step]).to(device)
    return step.to(device) * int(sizes[0]) + (sample if order is None else order[sample])
