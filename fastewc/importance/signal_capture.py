"""Watches one forward and adds up what passes through the weights of linear and convolutional calls (E8).

A call is caught where PyTorch's functions dispatch, so modules, functional calls, ties and reuse look the same. The
output of a call with a bias is *marked* until an activation consumes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fastewc._names import op_dtype

# function -> its argument names, in order, as far as they matter.
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LAYERS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _CONV_TRANSPOSE),
    torch.addmm: ("bias", "input", "weight"),
}  # fmt: skip
_ADDMM = torch.addmm
_SPATIAL = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}


def _functions(*names: str) -> frozenset[Callable[..., Any]]:
    """Every function of one of these names, wherever PyTorch has it; in-place spellings too."""
    homes = (F, torch, Tensor, torch.special)
    spelled = [spelling for name in names for spelling in (name, f"{name}_")]
    return frozenset(getattr(home, name) for home in homes for name in spelled if callable(getattr(home, name, None)))


_ACTIVATIONS = _functions(
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "logsigmoid", "expit",
    "tanh", "softplus", "softsign", "tanhshrink", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink",
    "threshold", "rrelu", "prelu", "clamp", "clamp_min", "sin", "cos", "erf", "exp",
)  # fmt: skip
_NORMS = _functions("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm")
_DROPOUTS = _functions("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_SOFTMAX = _functions("softmax")
# What changes neither the values nor their number: an activation behind it still follows directly.
_RESHAPES = _functions(
    "view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis",
    "squeeze", "unsqueeze", "contiguous", "t",
) | {Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]  # fmt: skip
_ASSIGNMENTS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__")


@dataclass
class _Unit:
    """One call of a layer with a bias that we want: the bias and its signal so far."""

    name: str
    total: Tensor  # [units]
    activated: bool = False


@dataclass(frozen=True)
class _Mark:
    """A tensor that holds the outputs of a unit's layer, and which of its entries belong to which unit."""

    unit: _Unit
    dim: int  # of the units, from the end
    keep: Tensor | None  # [positions], for the rows of a linear output
    labels: Tensor | None = None  # instead of both, once reshaped: the unit of each entry, −1 where it does not count

    def signal(self, values: Tensor) -> Tensor:
        """Σ|values| of each unit over what counts: [units]. ``values`` has the shape of the marked tensor."""
        values = values.to(op_dtype(self.unit.total)).abs()
        if self.labels is not None:
            sums = values.new_zeros(len(self.unit.total) + 1)
            return sums.index_add_(0, self.labels.flatten() + 1, values.flatten())[1:]
        if self.keep is not None:
            values = torch.where(self.keep.unsqueeze(-1), values, 0)
        return values.movedim(self.dim, 0).flatten(1).sum(dim=1) if values.ndim > 1 else values

    def reshaped(self, source: Tensor, change: Callable[[Tensor], Tensor]) -> _Mark:
        """The mark of ``change(source)``: the labels go the same way as the values."""
        labels = self.labels
        if labels is None:
            units = torch.arange(len(self.unit.total), device=source.device)
            labels = units.view(-1, *[1] * (-1 - self.dim)).expand(source.shape)
            if self.keep is not None:
                labels = torch.where(self.keep.unsqueeze(-1), labels, -1)
        return _Mark(self.unit, self.dim, None, change(torch.empty_like(source, dtype=torch.int64).copy_(labels)))


class Capture(TorchFunctionMode):
    """A context around one forward. ``sums`` holds Σ_n Σ_t of this batch afterwards, for the parameters that were used.

    Args:
        module: whose forward it is.
        parameters: the wanted parameters by name; every other one may be used in any way.
        keeps: bool masks of positions that count, the first that fits the shape of a linear input is used.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], keeps: Sequence[Tensor]) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self._names = {id(p): name for name, p in parameters.items()}
        self._keeps = keeps
        self._marks: Any = WeakTensorKeyDictionary()  # Tensor -> _Mark
        self._units: list[_Unit] = []
        self._softmaxes: list[tuple[_Mark, Any]] = []
        self._stack = contextlib.ExitStack()
        self._custom = [m for m in module.modules() if type(m).__module__ == "transformers.activations"]

    def __enter__(self) -> Capture:
        """Watch every function call, and the activations that transformers writes out in arithmetic."""
        with contextlib.ExitStack() as stack:
            for module in self._custom:
                stack.enter_context(module.register_forward_hook(self._after_custom_activation))
            self._stack = stack.pop_all()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop watching."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def _after_custom_activation(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self._activated(self._marks.get(inputs[0]), output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call, and note it if it is a layer, an activation, a norm or an unknown use of a parameter."""
        kwargs = kwargs or {}
        wanted = [self._names[id(t)] for t in _tensors((args, kwargs)) if id(t) in self._names]
        source = args[0] if args else kwargs.get("input")
        mark = self._marks.get(source) if isinstance(source, Tensor) else None
        if wanted and func in _LAYERS:
            return self._layer(func, args, kwargs, wanted)
        result = func(*args, **kwargs)
        if wanted and any(isinstance(part, Tensor) for part in _tensors((result,))):
            self._refuse(wanted[0], func)
        if mark is not None:
            if func in _RESHAPES:
                rest = {key: value for key, value in kwargs.items() if key != "input"}
                self._marks[result] = mark.reshaped(source, lambda labels: func(labels, *args[1:], **rest))
            else:
                self._follow(func, kwargs, mark, source, result)
        return result

    def _follow(self, func: Callable[..., Any], kwargs: dict[str, Any], mark: _Mark, source: Any, result: Any) -> None:
        """What a function that does not reshape makes of a marked tensor."""
        if func in _ACTIVATIONS:
            self._activated(mark, result)
            self._marks.pop(source, None)
        elif func in _NORMS or func in _DROPOUTS:
            if isinstance(result, Tensor):
                self._marks[result] = mark
        elif func in _SOFTMAX:
            self._softmaxes.append((mark, result))
        elif _writes(func, kwargs, source):
            self._marks.pop(source, None)

    def _layer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], wanted: list[str]
    ) -> Tensor:
        # torch.addmm calls its first argument "input", and the layer's input "mat1".
        spelled = {"input": "bias", "mat1": "input", "mat2": "weight"} if func is _ADDMM else {}
        call = dict(zip(_LAYERS[func], args, strict=False))
        call |= {spelled.get(key, key): value for key, value in kwargs.items()}
        a = call["input"]
        roles = [self._names.get(id(t)) for t in (call["weight"], call.get("bias"))]
        unknown = [name for name in wanted if name not in roles] or ([wanted[0]] if id(a) in self._names else [])
        scaled = func is _ADDMM and any(call.get(key, 1) != 1 for key in ("beta", "alpha"))
        if unknown or scaled or call.get("out") is not None or (roles[0] is not None and roles[0] == roles[1]):
            self._refuse((unknown or wanted)[0], func)
        result: Tensor = func(*args, **kwargs)
        keep = self._keep(func, a)
        if roles[0] is not None:
            self._add(roles[0], _weight_signal(func, call, keep))
        if roles[1] is not None:
            dim = -1 if func not in _SPATIAL else -1 - _SPATIAL[func]
            mark = _Mark(_Unit(roles[1], call["bias"].detach()), dim, keep)
            mark.unit.total = mark.signal(result)
            self._units.append(mark.unit)
            self._marks[result] = mark
        return result

    def _keep(self, func: Callable[..., Any], a: Tensor) -> Tensor | None:
        """The mask that belongs to a linear input [..., I]; its positions may have been flattened into rows."""
        if func in _SPATIAL:
            return None
        positions = a.shape[:-1]
        for keep in self._keeps:
            if keep.shape == positions or (a.ndim == 2 and keep.numel() == positions[0] and keep.ndim == 2):
                return keep.reshape(positions)
        return None

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _activated(self, mark: _Mark | None, result: Any) -> None:
        if mark is not None and not mark.unit.activated and isinstance(result, Tensor):
            mark.unit.total = mark.signal(result)
            mark.unit.activated = True

    def _refuse(self, name: str, func: Callable[..., Any]) -> None:
        what = getattr(func, "__name__", str(func))
        raise NotImplementedError(
            "signal_importance is defined for the weights and biases of linear and convolutional layers; parameter "
            f"{name!r} is used by {what}. Leave it out: exclude={name!r}"
        )

    def finish(self, returned: Sequence[Any]) -> None:
        """After the forward: ``returned`` are the objects that may be the model's returned tensor."""
        for mark, result in self._softmaxes:
            if any(one is result for one in returned):
                self._activated(mark, result)
        for unit in self._units:
            self._add(unit.name, unit.total)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list, Mapping)):
            yield from _tensors(value)


def _writes(func: Callable[..., Any], kwargs: dict[str, Any], source: Any) -> bool:
    """True if the function changes its first argument in place."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _ASSIGNMENTS or kwargs.get("inplace") is True or kwargs.get("out") is source


def _weight_signal(func: Callable[..., Any], call: dict[str, Any], keep: Tensor | None) -> Tensor:
    """Σ_n Σ_t |w a|, of the weight's shape: |w| ⊙ Σ|a| over the positions where each weight meets an input.

    For a convolution those sums are the gradient, with respect to its weight, of the sum of the outputs for |a|.
    """
    weight: Tensor = call["weight"].detach()
    dtype = op_dtype(weight)
    a: Tensor = call["input"].detach().to(dtype).abs()
    size = weight.to(dtype).abs()
    if func not in _SPATIAL:
        if keep is not None:
            a = torch.where(keep.unsqueeze(-1), a, 0)
        inputs_I = a.reshape(-1, a.shape[-1]).sum(dim=0)
        return size * (inputs_I.unsqueeze(1) if func is _ADDMM else inputs_I)
    options = {
        key: value for key, value in call.items() if key in _LAYERS[func] and key not in ("input", "weight", "bias")
    }
    with torch.enable_grad(), torch.autocast(a.device.type, enabled=False):
        dummy = torch.ones_like(size, requires_grad=True)
        (met,) = torch.autograd.grad(func(a, dummy, None, **options).sum(), dummy)
    return size * met
