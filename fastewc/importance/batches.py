"""Batches as users have them: read from any iterable, moved, cut along the batch dimension, never guessed at."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_USE_FORWARD = "pass forward=, a callable(model, batch) that returns (output, target or None)"
# In a Hugging Face batch one of these says how many samples there are.
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


def check_data(data: object) -> None:
    """Refuse what is one batch, or no iterable at all, where an iterable of batches is wanted."""
    if isinstance(data, Tensor):
        raise ValueError(
            f"data is one tensor of shape {tuple(data.shape)}; wanted an iterable of batches. For one batch: [(x,)]"
        )
    if isinstance(data, Mapping):
        raise ValueError("data is one mapping; wanted an iterable of batches. For one batch: [batch]")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        first, second = data
        same_length = first.shape[:1] == second.shape[:1]
        pair = first.dtype != second.dtype or first.ndim != second.ndim
        pair = pair or (same_length and first.shape[1:] != second.shape[1:])
        if isinstance(data, tuple) or pair:
            raise ValueError(
                "data is a pair of tensors, which reads as one batch (x, y); wanted an iterable of batches. For one "
                "batch: [(x, y)]. For two batches without targets: [(x1,), (x2,)]"
            )


def map_tensors(content: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of mappings, tuples and lists with every tensor changed; other things stay as they are."""
    if isinstance(content, Tensor):
        return change(content)
    if isinstance(content, PackedSequence):
        raise TypeError(
            "a PackedSequence can't be cut into samples; give the padded tensor and its lengths, and pack inside "
            "forward="
        )
    if isinstance(content, Mapping):
        return _map_values(content, lambda value: map_tensors(value, change))
    if isinstance(content, tuple) and hasattr(content, "_fields"):
        return type(content)(*(map_tensors(part, change) for part in content))
    if isinstance(content, (tuple, list)):
        return type(content)(map_tensors(part, change) for part in content)
    return content


def _map_values(content: Mapping[Any, Any], change: Callable[[Any], Any]) -> Mapping[Any, Any]:
    """A new mapping with every value changed.

    It keeps the type of dict's and UserDict's subclasses, whose copies are their own (a BatchEncoding stays one); a
    copy of any other mapping may share its values with the user's, so that becomes a dict.
    """
    changed = {key: change(value) for key, value in content.items()}
    if type(content) is dict or not isinstance(content, (dict, UserDict)):
        return changed
    like = copy.copy(content)
    like.update(changed)
    return like


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (tuple, list)):
        for value in content:
            yield from _tensors(value)


@dataclass(frozen=True)
class Batch:
    """A batch on the model's device: ``size`` samples along ``batch_dim``."""

    content: Any
    size: int
    batch_dim: int

    def dim(self, tensor: Tensor) -> int | None:
        """The dimension of ``tensor`` that counts samples: batch_dim if its size there is N, else 0, else None."""
        for dim in (self.batch_dim, 0):
            if tensor.ndim > dim and tensor.shape[dim] == self.size:
                return dim
        return None

    def rows(self, start: int, stop: int) -> Batch:
        """Samples start to stop. Tensors that do not count samples stay whole; lists of N other objects are cut."""
        if (start, stop) == (0, self.size):
            return self
        return Batch(self._cut(self.content, start, stop), stop - start, self.batch_dim)

    def _cut(self, content: Any, start: int, stop: int) -> Any:
        if isinstance(content, Mapping):
            return _map_values(content, lambda value: self._cut(value, start, stop))
        if (
            isinstance(content, (list, tuple))
            and len(content) == self.size
            and not any(True for _ in _tensors(content))
        ):
            return content[start:stop]
        if isinstance(content, tuple) and hasattr(content, "_fields"):
            return type(content)(*(self._cut(part, start, stop) for part in content))
        if isinstance(content, (tuple, list)):
            return type(content)(self._cut(part, start, stop) for part in content)
        if isinstance(content, Tensor):
            dim = self.dim(content)
            return content if dim is None else content.narrow(dim, start, stop - start)
        return content


def read_batch(raw: Any, device: torch.device, batch_dim: int, *, custom: bool) -> Batch:
    """Move a batch and find its N; without ``forward`` (custom=False) also check that it is one we can feed a model."""
    if not custom:
        _check_form(raw)

    def move(tensor: Tensor) -> Tensor:
        moved = tensor.detach().to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved  # autograd can't save inference tensors

    content = map_tensors(raw, move)
    main = _main_tensor(content)
    if main is None:
        what = (
            f"{type(raw).__name__} without any tensor"
            if isinstance(raw, (Mapping, tuple, list))
            else type(raw).__name__
        )
        raise TypeError(
            f"a batch must be a tensor, (x,), (x, y) or a mapping with tensors, got {what}; otherwise {_USE_FORWARD}"
        )
    if main.ndim <= batch_dim:
        raise ValueError(
            f"a batch of shape {tuple(main.shape)} has no dimension {batch_dim} that counts samples; data must yield "
            "batches (wrap a dataset of single samples in a DataLoader)"
        )
    batch = Batch(content, int(main.shape[batch_dim]), batch_dim)
    if not custom:
        _check_sizes(batch)
    return batch


def _check_form(raw: Any) -> None:
    if isinstance(raw, (Tensor, Mapping)):
        return
    if not isinstance(raw, (tuple, list)):
        raise TypeError(
            f"a batch must be a tensor, (x,), (x, y) or a mapping, got {type(raw).__name__}; otherwise {_USE_FORWARD}"
        )
    if len(raw) not in (1, 2):
        raise ValueError(
            f"a batch of {len(raw)} parts: which is the input, which the target? For anything but (x,) and (x, y) "
            f"{_USE_FORWARD}"
        )
    if not isinstance(raw[0], Tensor):
        raise TypeError(f"x of a batch must be a tensor, got {type(raw[0]).__name__}; otherwise {_USE_FORWARD}")
    if len(raw) == 2 and raw[1] is not None and not isinstance(raw[1], Tensor):
        raise TypeError(
            f"y of a batch (x, y) must be a tensor, got {type(raw[1]).__name__}; data must yield batches (wrap a "
            f"dataset of single samples in a DataLoader), otherwise {_USE_FORWARD}"
        )


def _main_tensor(content: Any) -> Tensor | None:
    if isinstance(content, Mapping):
        for key in _MAIN_INPUTS:
            if isinstance(content.get(key), Tensor):
                found: Tensor = content[key]
                return found
    tensors = list(_tensors(content))
    return next((tensor for tensor in tensors if tensor.ndim > 0), tensors[0] if tensors else None)


def _check_sizes(batch: Batch) -> None:
    """Without forward= every tensor must count N samples; a mapping may also hold scalars and size-1 constants."""
    mapping = isinstance(batch.content, Mapping)
    for tensor in _tensors(batch.content):
        constant = mapping and (tensor.ndim == 0 or tensor.shape[0] == 1)
        if batch.dim(tensor) is None and not constant and (batch.size != 1 or not mapping):
            raise ValueError(
                f"the batch has {batch.size} samples along dimension {batch.batch_dim}, but holds a tensor of shape "
                f"{tuple(tensor.shape)} that can't be cut into them; give batches of one sample, or {_USE_FORWARD}"
            )


class Joined:
    """Consecutive batches as one, copied as they come: an iterable may reuse their memory.

    Only batches that are tensors, tuples, lists or dicts of tensors which all count samples in dimension 0 can be
    joined, and only with others of the same form.
    """

    def __init__(self, first: Batch, capacity: int) -> None:
        self.size, self._capacity, self._first = 0, capacity, first
        self._form = _form(first)
        self._buffers = [t.new_empty((capacity, *t.shape[1:])) for t in _tensors(first.content)]

    @staticmethod
    def can_begin(batch: Batch) -> bool:
        """True for a batch that others can be joined to."""
        return batch.batch_dim == 0 and _form(batch) is not None

    @staticmethod
    def bytes_of(batch: Batch) -> int:
        """The size of a sample."""
        return sum(t.numel() * t.element_size() for t in _tensors(batch.content)) // batch.size

    def takes(self, batch: Batch) -> bool:
        """True if there is room, and the batch is of the same form."""
        return self.size + batch.size <= self._capacity and _form(batch) == self._form

    def append(self, batch: Batch) -> None:
        """Copy a batch."""
        for buffer, tensor in zip(self._buffers, _tensors(batch.content), strict=True):
            buffer[self.size : self.size + batch.size] = tensor
        self.size += batch.size

    def batch(self) -> Batch:
        """All of them."""
        parts = iter([buffer[: self.size] for buffer in self._buffers])
        return Batch(map_tensors(self._first.content, lambda _: next(parts)), self.size, 0)


def _form(batch: Batch) -> object:
    """What two batches must have in common to be joined; None for what can't be."""
    content = batch.content
    parts: list[object] = [type(content)]
    if type(content) is dict:
        parts.append(tuple(content))
    values = [content] if isinstance(content, Tensor) else list(content.values()) if type(content) is dict else content
    if not isinstance(values, (list, tuple)) or hasattr(values, "_fields"):
        return None
    for value in values:
        if (
            type(value) is not Tensor
            or value.layout != torch.strided
            or value.ndim == 0
            or value.shape[0] != batch.size
        ):
            return None
        parts.append((value.dtype, value.device, tuple(value.shape[1:]), value.requires_grad))
    return tuple(parts)
