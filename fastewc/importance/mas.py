"""Memory aware synapses: how much the squared norm of the output moves with each weight (equation E6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastewc._dispatch import Impl
from fastewc._names import Exclude
from fastewc.importance.base import Importance
from fastewc.importance.data_pass import PassOptions, run_pass
from fastewc.importance.evaluate import Evaluated, Evaluator, Forward, ignored
from fastewc.importance.samples import SampleMeasure, check_batch_dimension, check_class_dimension, rows_of
from fastewc.ops.squared_norm_grad import squared_norm_grad
from fastewc.per_sample import Term


def mas_importance(
    model: nn.Module,
    data: Any,
    output: Literal["logits", "softmax"] = "logits",
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    impl: Literal["auto", "reference", "triton", "native"] = "auto",
    verify: bool = False,
    progress: bool = False,
    generator: torch.Generator | None = None,
    process_group: Any = None,
    batch_dim: int = 0,
    allow_dropout: bool = False,
    exclude: Exclude = (),
) -> Importance:
    """Memory aware synapses: Ω_i = (1/N) Σ_n |∂ ‖f(x_n)‖² / ∂w_i| (E6), the absolute value taken per sample.

    ‖f‖² sums over everything that the model returns for the sample: all positions of a sequence that count, all
    classes. No ½. Source: Aljundi et al. 2018 (arXiv 1711.09601); with softmax outputs Kutalev and Lapina 2021 (arXiv
    2109.10021).

    Args:
        model: any module; DDP, torch.compile and checkpoint wrappers are looked through. Call ``model.eval()`` first.
        data: an iterable of batches, as in :func:`fastewc.fisher_importance`; targets are not needed. Positions whose
            target is −100, or without labels whose attention_mask is 0, are left out of ‖f‖²; with "logits" also the
            single entries that a target of the output's shape marks with −100.
        output: f is the output itself ("logits"), or its softmax over the last dimension ("softmax").
        forward: as in :func:`fastewc.fisher_importance`, as are all arguments below.
        max_samples: use the first so many samples.
        impl: the implementation; an explicit one that can't run raises.
        verify: first compare two samples in one batch with the same two one by one, and raise if they differ.
        progress: show a tqdm bar.
        generator: accepted for symmetry; MAS draws nothing.
        process_group: the ranks to sum over.
        batch_dim: which dimension counts samples.
        allow_dropout: run with active dropout instead of refusing it.
        exclude: fnmatch pattern(s) of parameter names to leave out.

    Returns:
        Importance by parameter name, float32 (float64 for float64 parameters); method "mas/logits" or "mas/softmax".

    Raises:
        ValueError: an unknown output, or a batch or model that can't give per-sample gradients.
        TypeError: arguments or batches of the wrong type.
        NotImplementedError: an impl that can't run, DTensor or FSDP1 parameters, reentrant activation
            checkpointing together with forward=.
        RuntimeError: another rank failed; verify=True found a difference.
    """
    if output not in ("logits", "softmax"):
        raise ValueError(f"output must be 'logits' or 'softmax', got {output!r}")
    options = PassOptions(
        forward, max_samples, impl, verify, progress, generator, process_group, batch_dim, allow_dropout, exclude
    )

    def measure(evaluator: Evaluator, parameters: Mapping[str, nn.Parameter]) -> Mas:
        return Mas(evaluator, parameters, output, impl)

    return run_pass(model, data, options, f"mas/{output}", measure)


class Mas(SampleMeasure):
    """One backward pass per sample, seeded with ∂‖f‖²/∂y."""

    def __init__(self, evaluator: Evaluator, parameters: Mapping[str, nn.Parameter], output: str, impl: Impl) -> None:
        super().__init__(evaluator, parameters, power=1, impl=impl)
        self._output = output
        self._impl: Impl = impl

    def check_evaluated(self, seen: Evaluated) -> None:
        """The target fits an output that :meth:`check_samples` passes."""
        self.check_samples(seen)
        self._check_target(seen.output, seen.target)

    def check_samples(self, seen: Evaluated) -> None:
        """The output holds N samples, and for the softmax a class dimension."""
        output = seen.output
        check_batch_dimension(seen, output)
        if output.ndim < 2 and self._output == "softmax":
            raise ValueError(f"output='softmax' wants an output [N, ..., C], got shape {tuple(output.shape)}")

    def _check_target(self, output: Tensor, target: Tensor | None) -> None:
        partly = target is not None and bool(ignored(target).any())
        if self._output == "softmax" or partly:
            check_class_dimension(output, target)
        if self._output == "softmax" and partly and target is not None and target.shape == output.shape:
            raise ValueError(
                "output='softmax' with a target of the output's shape that holds −100: a part of a softmax can't be "
                "left out. Use output='logits', or a target of shape [N, ...] without the class dimension"
            )

    def terms(self, seen: Evaluated) -> Iterator[Term]:
        """The counted positions of the output, each a row; or its counted entries, where the target is elementwise."""
        output, target = seen.output, seen.target
        self._check_target(output, target)
        elementwise = self._output == "logits" and (
            output.ndim < 2 or (target is not None and target.shape == output.shape)
        )
        rows = rows_of(output, seen.counted(output, elementwise=elementwise), elementwise=elementwise)
        if rows.numel():
            yield Term(rows, squared_norm_grad(rows.detach(), self._output, self._impl))
