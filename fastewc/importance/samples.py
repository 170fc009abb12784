"""What Fisher and MAS share: each sample by itself through the model, its terms into the per-sample sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fastewc.importance.batches import Batch
from fastewc.importance.evaluate import Evaluated, Evaluator
from fastewc.per_sample import BatchOneSums, Term


class SampleMeasure:
    """A measure that is a sum over samples of |gradient|^power; subclasses say of what the gradient is."""

    def __init__(self, evaluator: Evaluator, parameters: Mapping[str, nn.Parameter], power: int) -> None:
        self._evaluator = evaluator
        for name, parameter in parameters.items():
            if parameter._backward_hooks:
                raise ValueError(
                    f"parameter {name!r} has a hook (register_hook) that may change its gradient, and so the "
                    "importance; remove it for the pass"
                )
        self._engine = BatchOneSums(evaluator.module, parameters, power, foreign=evaluator.custom is not None)
        self.sums, self.used = self._engine.sums, self._engine.used
        self.path, self.reason = self._engine.path, self._engine.reason

    def check_evaluated(self, seen: Evaluated) -> None:
        """Raise if the first batch, evaluated as a whole, can't be right."""
        raise NotImplementedError

    def terms(self, seen: Evaluated) -> Iterator[Term]:
        """The gradients to take for one evaluated sample."""
        raise NotImplementedError

    def check(self, batch: Batch) -> Evaluated:
        """Evaluate the whole first batch: only there do a batch-mean loss and a lost batch dimension show."""
        seen = self._evaluator(batch)
        self.check_evaluated(seen)
        return seen

    def add(self, batch: Batch) -> None:
        """Each sample of the batch, one after the other."""
        for index in range(batch.size):
            self._engine.add(self.terms(self._evaluator(batch.rows(index, index + 1))))

    def nothing_measured(self) -> bool:
        """True if there were terms and none of them depended on anything."""
        return self._engine.terms > 0 and not self._engine.reached


def check_batch_dimension(seen: Evaluated, output: Tensor) -> None:
    """Raise ValueError unless the output of a batch of N samples has N samples."""
    if seen.size not in [output.shape[dim] for dim in (seen.batch_dim, 0) if dim < output.ndim]:
        raise ValueError(
            f"a batch of {seen.size} samples (dimension {seen.batch_dim}) gave an output of shape "
            f"{tuple(output.shape)}, which has no such dimension. Check batch_dim, or pass forward= that returns one "
            "output per sample"
        )


def check_class_dimension(output: Tensor, target: Tensor | None) -> None:
    """Raise ValueError for an output [N, C, d...] with a target [N, d...]: classes must come last."""
    if target is None or output.ndim < 3 or target.shape == output.shape[:-1]:
        return
    if target.shape == output.shape[:1] + output.shape[2:]:
        raise ValueError(
            f"output {tuple(output.shape)} with a target of shape {tuple(target.shape)} looks like [N, C, ...]: the "
            "class dimension must be the last: move it there in forward="
        )


def rows_of(output: Tensor, counted: Tensor | None, *, elementwise: bool) -> Tensor:
    """The counted positions of an output, in order: [K, C], or [K] elementwise; at least float32 for the arithmetic."""
    if output.dtype not in (torch.float32, torch.float64):
        output = output.float()
    if counted is not None:
        return output[counted]
    return output.reshape(-1) if elementwise else output.reshape(-1, output.shape[-1])
