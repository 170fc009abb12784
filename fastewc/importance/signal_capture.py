"""Watches one forward and adds up what passes through the weights of linear and convolutional calls (E8).

A call is caught where PyTorch's functions dispatch, so modules, functional calls, ties and reuse look the same. The
output of a call with a bias is *marked*, and the mark passes through norms, dropout and reshapes to the activation. It
follows one reader only: where something else reads the tensor too (a residual, a view, a write), nothing follows the
layer directly, and the output itself counts, as it was before any write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fastewc._names import op_dtype
from fastewc.importance.signal_functions import (
    ACTIVATIONS,
    ADDMM,
    DROPOUTS,
    LAYERS,
    METADATA,
    NORMS,
    RESHAPES,
    SAME,
    SOFTMAX,
    SPATIAL,
)


@dataclass
class _Unit:
    """One call of a layer with a bias that we want: the bias and the signals that may become its own."""

    name: str
    total: Tensor  # [units], of the output itself
    activated: Tensor | None = None  # [units], behind the activation
    branched: bool = False  # something else reads the output too, so no activation follows it directly


@dataclass
class _Mark:
    """A tensor that holds the outputs of a unit's layer, and which of its entries belong to which unit."""

    unit: _Unit
    dim: int  # of the units, from the end
    keep: Tensor | None  # of what counts, broadcastable to the output
    labels: Tensor | None = None  # instead of both, once reshaped: the unit of each entry, −1 where it does not count
    read: bool = False

    def signal(self, values: Tensor) -> Tensor:
        """Σ|values| of each unit over what counts: [units]. ``values`` has the shape of the marked tensor."""
        values = values.to(op_dtype(self.unit.total)).abs()
        if self.labels is not None:
            sums = values.new_zeros(len(self.unit.total) + 1)
            return sums.index_add_(0, self.labels.flatten() + 1, values.flatten())[1:]
        if self.keep is not None:
            values = torch.where(self.keep, values, 0)
        return values.movedim(self.dim, 0).flatten(1).sum(dim=1) if values.ndim > 1 else values

    def reshaped(self, source: Tensor, change: Callable[[Tensor], Tensor]) -> _Mark:
        """The mark of ``change(source)``: the labels go the same way as the values."""
        labels = self.labels
        if labels is None:
            units = torch.arange(len(self.unit.total), device=source.device)
            labels = units.view(-1, *[1] * (-1 - self.dim)).expand(source.shape)
            if self.keep is not None:
                labels = torch.where(self.keep, labels, -1)
        return _Mark(self.unit, self.dim, None, change(torch.empty_like(source, dtype=torch.int64).copy_(labels)))


class Capture(TorchFunctionMode):
    """A context around one forward. ``sums`` holds Σ_n Σ_t of this batch afterwards, for the parameters that were used.

    Args:
        module: whose forward it is.
        parameters: the wanted parameters by name; every other one may be used in any way.
        keeps: bool masks of positions that count; the first that fits a layer's positions is used.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], keeps: Sequence[Tensor]) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self.refused: dict[str, str] = {}  # parameter name → the function that uses it
        self._names = {id(p): name for name, p in parameters.items()}
        self._keeps = keeps
        self._marks: Any = WeakTensorKeyDictionary()  # Tensor -> _Mark
        self._units: list[_Unit] = []
        self._softmaxes: list[tuple[_Mark, Any]] = []
        self._stack = contextlib.ExitStack()
        self._custom = [m for m in module.modules() if type(m).__module__ == "transformers.activations"]
        self._inside = 0  # how deep in such a module: its arithmetic is one activation

    def __enter__(self) -> Capture:
        """Watch every function call, and the activations that transformers writes out in arithmetic."""
        with contextlib.ExitStack() as stack:
            for module in self._custom:
                stack.enter_context(module.register_forward_pre_hook(self._before_custom_activation))
                stack.enter_context(module.register_forward_hook(self._after_custom_activation, always_call=True))
            self._stack = stack.pop_all()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop watching."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def _before_custom_activation(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inside += 1

    def _after_custom_activation(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1
        if not self._inside and inputs and isinstance(inputs[0], Tensor):
            self._activated(self._read(inputs[0]), inputs[0], output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call, and note it if it is a layer, an activation, a norm or an unknown use of a parameter."""
        kwargs = kwargs or {}
        used = list(_tensors((args, kwargs)))
        wanted = [self._names[id(t)] for t in used if id(t) in self._names]
        source = args[0] if args else kwargs.get("input")
        if wanted and func in LAYERS:
            result = self._layer(func, args, kwargs, wanted)
        else:
            result = func(*args, **kwargs)
            if wanted and not _looks_only(func, result):
                self._refuse(wanted, func)
        if not self._inside and not _looks_only(func, result) and not (result is source and func in SAME):
            for tensor in used:
                mark = self._read(tensor)
                if mark is not None and tensor is source:
                    self._follow(func, args, kwargs, mark, result)
        return result

    def _read(self, tensor: Tensor) -> _Mark | None:
        """The mark of a tensor, for its first reader only."""
        mark: _Mark | None = self._marks.get(tensor)
        if mark is not None and mark.read:
            mark.unit.branched = True
            return None
        if mark is not None:
            mark.read = True
        return mark

    def _follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mark: _Mark, result: Any
    ) -> None:
        """What a function makes of a marked tensor."""
        source = args[0] if args else kwargs["input"]
        if func in ACTIVATIONS:
            self._activated(mark, source, result)
        elif func in RESHAPES:
            rest = {key: value for key, value in kwargs.items() if key != "input"}
            self._marks[result] = mark.reshaped(source, lambda labels: func(labels, *args[1:], **rest))
        elif func in NORMS or func in DROPOUTS:
            self._marks[result] = replace(mark, read=False)
        elif func in SOFTMAX:
            self._softmaxes.append((mark, result))

    def _layer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], wanted: list[str]
    ) -> Tensor:
        # torch.addmm calls its first argument "input", and the layer's input "mat1".
        spelled = {"input": "bias", "mat1": "input", "mat2": "weight"} if func is ADDMM else {}
        call = dict(zip(LAYERS[func], args, strict=False))
        call |= {spelled.get(key, key): value for key, value in kwargs.items()}
        a = call["input"]
        roles = [self._names.get(id(t)) for t in (call["weight"], call.get("bias"))]
        unknown = [name for name in wanted if name not in roles or name == self._names.get(id(a))]
        scaled = func is ADDMM and any(call.get(key, 1) != 1 for key in ("beta", "alpha"))
        result: Tensor = func(*args, **kwargs)
        if unknown or scaled or call.get("out") is not None or (roles[0] is not None and roles[0] == roles[1]):
            self._refuse(unknown or wanted, func)
            return result
        spatial = SPATIAL.get(func)
        keep = self._keep(a) if spatial is None else self._keep_spatial(result, spatial)
        if roles[0] is not None:
            self._add(roles[0], _weight_signal(func, call, keep))
        if roles[1] is not None:
            unit = _Unit(roles[1], call["bias"].detach())
            mark = _Mark(unit, -1 if spatial is None else -1 - spatial, keep)
            unit.total = mark.signal(result)
            self._units.append(unit)
            self._marks[result] = mark
        return result

    def _keep(self, a: Tensor) -> Tensor | None:
        """The mask [..., 1] of a linear input [..., I], batch or time first; its positions may be flattened to rows."""
        positions = a.shape[:-1]
        for keep in self._keeps:
            if keep.shape == positions or (a.ndim == 2 and keep.numel() == positions[0] and keep.ndim == 2):
                return keep.reshape(positions).unsqueeze(-1)
            if keep.ndim == 2 and keep.T.shape == positions:
                return keep.T.unsqueeze(-1)
        return None

    def _keep_spatial(self, result: Tensor, spatial: int) -> Tensor | None:
        """The mask [N, 1, ...] of a convolution's output [N, O, ...]."""
        for keep in self._keeps:
            for one in (keep, keep.T) if keep.ndim == 2 else (keep,):
                if result.ndim == spatial + 2 and one.shape == result.shape[:1] + result.shape[2:]:
                    return one.unsqueeze(1)
        if not all(bool(keep.all()) for keep in self._keeps):
            shapes = " or ".join(str(tuple(keep.shape)) for keep in self._keeps)
            raise NotImplementedError(
                f"signal_importance: a convolution's output {tuple(result.shape)} does not have the positions of the "
                f"labels or mask {shapes}, some of which do not count. Leave its parameters out (exclude=), or give "
                "batches without padding"
            )
        return None

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _activated(self, mark: _Mark | None, source: Tensor, result: Any) -> None:
        if mark is not None and isinstance(result, Tensor):
            mark.unit.activated = mark.signal(result)
            if result is source:  # in place: who reads it from now on reads the activation
                self._marks.pop(source, None)

    def _refuse(self, names: Sequence[str], func: Callable[..., Any]) -> None:
        for name in names:
            self.refused.setdefault(name, getattr(func, "__name__", str(func)))

    def finish(self, returned: Sequence[Any]) -> None:
        """After the forward: ``returned`` are the objects that may be the model's returned tensor.

        Raises:
            NotImplementedError: a parameter was used in another way; all of them are named.
        """
        if self.refused:
            uses = ", ".join(f"{name!r} (used by {what})" for name, what in self.refused.items())
            raise NotImplementedError(
                "signal_importance is defined for the weights and biases of linear and convolutional layers, not for "
                f"{uses}. Leave them out: exclude={list(self.refused)!r}"
            )
        for mark, result in self._softmaxes:
            if any(one is result for one in returned):
                self._activated(mark, result, result)
        for unit in self._units:
            self._add(unit.name, unit.total if unit.branched or unit.activated is None else unit.activated)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list, Mapping)):
            yield from _tensors(value)


def _looks_only(func: Callable[..., Any], result: Any) -> bool:
    """True for shape, dtype, device and the like: what reads no values."""
    attribute = getattr(func, "__name__", "") == "__get__" and not any(True for _ in _tensors((result,)))
    return attribute or func in METADATA


def _weight_signal(func: Callable[..., Any], call: dict[str, Any], keep: Tensor | None) -> Tensor:
    """Σ_n Σ_t |w a|, of the weight's shape: |w| ⊙ Σ|a| over the positions where each weight meets an input.

    For a convolution those sums are the gradient, with respect to its weight, of the sum of the outputs for |a|.
    """
    weight: Tensor = call["weight"].detach()
    dtype = op_dtype(weight)
    a: Tensor = call["input"].detach().to(dtype).abs()
    size = weight.to(dtype).abs()
    if func not in SPATIAL:
        if keep is not None:
            a = torch.where(keep, a, 0)
        inputs_I = a.reshape(-1, a.shape[-1]).sum(dim=0)
        return size * (inputs_I.unsqueeze(1) if func is ADDMM else inputs_I)
    options = {
        key: value for key, value in call.items() if key in LAYERS[func] and key not in ("input", "weight", "bias")
    }
    with torch.enable_grad(), torch.autocast(a.device.type, enabled=False):
        dummy = torch.ones_like(size, requires_grad=True)
        outputs = func(a, dummy, None, **options)
        (met,) = torch.autograd.grad((outputs if keep is None else torch.where(keep, outputs, 0)).sum(), dummy)
    return size * met
