"""The diagonal of the Fisher information, from true per-sample gradients (equation E5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastewc._dispatch import Impl
from fastewc._names import Exclude, op_dtype
from fastewc.importance.base import Importance
from fastewc.importance.batches import Batch
from fastewc.importance.data_pass import PassOptions, run_pass
from fastewc.importance.evaluate import Evaluated, Evaluator, Forward, logits_or_raw
from fastewc.importance.likelihoods import LIKELIHOODS, Likelihood
from fastewc.importance.samples import SampleMeasure, check_batch_dimension, check_class_dimension, rows_of
from fastewc.per_sample import Term

Loss = Literal["categorical", "gaussian", "bernoulli"] | Callable[[Any, Any], Tensor]
Labels = Literal["dataset", "predicted", "sampled", "expected"]
LABELS = ("dataset", "predicted", "sampled", "expected")
MAX_EXPECTED_PASSES = 1024


def fisher_importance(
    model: nn.Module,
    data: Any,
    loss: Loss = "categorical",
    labels: Labels = "dataset",
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
    """Diagonal of the Fisher information: Ω_i = (1/N) Σ_n (∂ log p(y_n|x_n) / ∂w_i)² (E5), exact per sample.

    A sample is one index of the batch dimension: one image, one whole sequence. Its loss is the *sum* over its
    positions. The square is taken per sample, never of a batch's mean gradient, so the result does not depend on how
    the data was batched. Source: Kirkpatrick et al. 2017 (arXiv 1612.00796); for which labels, Kunstner et al. 2019
    (arXiv 1905.12558).

    Call ``model.eval()`` first. The pass leaves mode, ``.grad``, requires_grad, buffers and torch's random state as
    they are. Autocast stays on if the caller has it on.

    Args:
        model: any module; DDP, torch.compile and checkpoint wrappers are looked through.
        data: an iterable of batches, moved to the model's device: a tensor, ``(x,)``, ``(x, y)``, or a mapping whose
            ``labels`` are the target and the rest the model's keyword arguments. For Hugging Face decoder language
            models labels are shifted by one, as their own loss does. Targets −100 do not count; neither do, where there
            are no labels, positions with attention_mask 0 (for an encoder-decoder: decoder_attention_mask). A sample
            without any counted position still counts in N.
        loss: "categorical": output [N, ..., C], integer targets [N, ...]. "gaussian": −log p = ½‖f − y‖², target of the
            output's shape. "bernoulli": output are logits, target of their shape in [0, 1]. Or a callable(output,
            target) that returns per-sample losses [N]; it gets ``output.logits`` where the model's output has that,
            else the output as it is, and target None where the batch has none.
        labels: whose y. "dataset": the target (the empirical Fisher). "predicted": the most probable. "sampled": one
            draw from the model per position. "expected": the exact expectation over labels, Σ_t Σ_c p_tc (∂ log p_tc)²
            for categorical, Σ_o (∂f_o)² for gaussian, Σ_o p_o(1−p_o)(∂z_o)² for bernoulli; one backward pass per
            counted position and class (or output), at most 1,024 per sample.
        forward: callable(model, moved batch) → (output, target or None), for any other form of batch or model call. Any
            tensor in the batch whose size along the batch dimension is N is cut into samples.
        max_samples: use the first so many samples in iteration order; over ranks, sample j of rank r is number
            j·world + r (what DistributedSampler deals out).
        impl: the implementation of the per-sample sums; an explicit one that can't run raises.
        verify: first compare two samples in one batch with the same two one by one, and raise if they differ.
        progress: show a tqdm bar.
        generator: where "sampled" draws from; None: a fork of torch's default state, so torch.manual_seed repeats it.
        process_group: the ranks to sum over where torch.distributed is initialised: None for the default group, False
            for this rank alone. The gradients need no communication; sums and counts are exchanged once, at the end.
        batch_dim: which dimension counts samples: 0, or 1 for time-major inputs [T, N, ...]. A tensor is cut along it
            if its size there is N, else along dimension 0 if that is N (targets [N]).
        allow_dropout: run with active dropout (or other randomness in the forward) instead of refusing it; the first
            sample is then not compared with itself alone, which otherwise finds forwards that mix samples.
        exclude: fnmatch pattern(s) of parameter names to leave out; one that matches no parameter, trainable or
            frozen, raises.

    Returns:
        Importance by parameter name of the unwrapped model, float32 (float64 for float64 parameters), trainable
        parameters only, a tie under its first name, one that the forward never uses as 0. method is
        "fisher/<loss>/<labels>", "fisher/custom/dataset" for a callable.

    Raises:
        ValueError: a batch, target, loss or model that can't give per-sample gradients; the message says which and why.
        TypeError: arguments, batches or targets of the wrong type.
        NotImplementedError: an impl that can't run, DTensor or FSDP1 parameters, reentrant activation
            checkpointing together with forward=.
        RuntimeError: another rank failed; verify=True found a difference.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(map(repr, LABELS))}, got {labels!r}")
    likelihood: Likelihood | None = None
    if not callable(loss):
        likelihood = LIKELIHOODS.get(loss) if isinstance(loss, str) else None
        if likelihood is None:
            raise ValueError(
                f"loss must be one of {', '.join(map(repr, LIKELIHOODS))} or a callable(output, target), got {loss!r}"
            )
        if loss == "gaussian" and labels == "predicted":
            raise ValueError(
                "loss='gaussian' with labels='predicted' is identically zero: the predicted y is f itself. Use "
                "'expected' or 'sampled'"
            )
    elif labels != "dataset":
        raise ValueError(
            f"labels={labels!r} needs a named loss: a callable does not say how y is distributed. Use labels='dataset'"
        )
    options = PassOptions(
        forward, max_samples, impl, verify, progress, generator, process_group, batch_dim, allow_dropout, exclude
    )
    name = "custom" if likelihood is None else likelihood.name

    def measure(evaluator: Evaluator, parameters: Mapping[str, nn.Parameter]) -> SampleMeasure:
        if likelihood is None:
            assert callable(loss)
            return CallableFisher(evaluator, parameters, loss, impl)
        return Fisher(evaluator, parameters, likelihood, labels, generator, impl)

    return run_pass(model, data, options, f"fisher/{name}/{labels}", measure)


class Fisher(SampleMeasure):
    """Per-sample terms of a named likelihood."""

    def __init__(
        self,
        evaluator: Evaluator,
        parameters: Mapping[str, nn.Parameter],
        likelihood: Likelihood,
        labels: str,
        generator: torch.Generator | None,
        impl: Impl,
    ) -> None:
        super().__init__(evaluator, parameters, power=2, impl=impl)
        self._likelihood = likelihood
        self._labels = labels
        self._generator = generator
        self._drawn: list[Tensor] = []
        self._again: Tensor | None = None

    def check_evaluated(self, seen: Evaluated) -> None:
        """Output and target fit each other and hold N samples."""
        self.check_samples(seen)
        self._check(seen.output, seen.target)

    def check_samples(self, seen: Evaluated) -> None:
        """The output holds N samples."""
        check_batch_dimension(seen, seen.output)

    def _check(self, output: Tensor, target: Tensor | None) -> None:
        self._likelihood.check_output(output)
        if not self._likelihood.elementwise:
            check_class_dimension(output, target)
        if self._labels != "dataset":
            return
        if target is None:
            raise ValueError(
                f"labels='dataset' with loss={self._likelihood.name!r} needs targets: give batches (x, y) or a "
                "mapping with labels, or use labels='predicted', 'sampled' or 'expected'"
            )
        self._likelihood.check_target(output, target)

    def terms(self, seen: Evaluated) -> Iterator[Term]:
        """−log p(y), or each part of its expectation."""
        output = seen.output
        self._check(output, seen.target)
        counted = seen.counted(output, elementwise=self._likelihood.elementwise)
        rows = rows_of(output, counted, elementwise=self._likelihood.elementwise)
        if rows.shape[0] == 0:
            return
        if self._labels == "expected":
            yield from self._expected(rows, seen.size, counted)
            return
        if self._labels == "sampled":
            yield Term(*self._likelihood.sampled_term(rows, self._uniform(rows)))
            return
        if self._labels == "dataset":
            assert seen.target is not None
            target = seen.target.reshape(-1) if counted is None else seen.target[counted]
        else:
            target = self._likelihood.predicted(rows.detach())
        yield Term(*self._likelihood.term(rows, target))

    def by_sample(self, batch: Batch) -> bool:
        """Rows of a batch follow each other sample by sample only where samples are the first dimension."""
        return batch.batch_dim != 0 and self._labels in ("sampled", "expected")

    @contextmanager
    def redrawn(self) -> Iterator[Callable[[], None]]:
        """The numbers drawn inside can be used again."""

        def again() -> None:
            self._again = torch.cat(self._drawn) if self._drawn else None

        try:
            yield again
        finally:
            self._drawn, self._again = [], None

    def _uniform(self, rows: Tensor) -> Tensor:
        """One number per row, drawn in order and for counted rows only: batching and padding change nothing."""
        if self._again is not None:
            numbers, self._again = self._again.tensor_split([rows.shape[0]])
        else:
            device = torch.device("cpu") if self._generator is None else self._generator.device
            numbers = torch.rand(rows.shape[0], dtype=torch.float64, generator=self._generator, device=device)
            self._drawn.append(numbers)
        return numbers.to(rows.device)

    def _expected(self, rows: Tensor, samples: int, counted: Tensor | None) -> Iterator[Term]:
        """Term k is what the k-th entry of each sample adds, its weight moved into the seed: (√w g)² = w g²."""
        if counted is None:
            lengths = torch.full((samples,), rows.shape[0] // samples, device=rows.device)
        else:
            lengths = counted.reshape(samples, -1).sum(1)
        longest, width = int(lengths.max()), rows[0].numel()
        if longest * width > MAX_EXPECTED_PASSES:
            raise ValueError(
                "labels='expected' takes one backward pass per counted position and class (or output): "
                f"{longest * width} for a sample, more than {MAX_EXPECTED_PASSES}. Use labels='sampled', an unbiased "
                "estimate of the same"
            )
        values, weights = self._likelihood.expected(rows)
        roots = weights.sqrt().reshape(rows.shape[0], width)
        first = lengths.cumsum(0) - lengths
        position = torch.arange(rows.shape[0], device=rows.device) - first.repeat_interleave(lengths)
        for k in range(longest):
            there = position == k
            for column in range(width):
                seed = torch.zeros_like(roots)
                seed[there, column] = roots[there, column]
                if bool(seed.any()):  # 0 · (∂ log 0)² would be NaN
                    yield Term(values, seed.view_as(values), keep_graph=True)


class CallableFisher(SampleMeasure):
    """Per-sample terms of the user's own loss."""

    def __init__(
        self,
        evaluator: Evaluator,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[Any, Any], Tensor],
        impl: Impl,
    ) -> None:
        super().__init__(evaluator, parameters, power=2, impl=impl)
        self._loss = loss

    def check_evaluated(self, seen: Evaluated) -> None:
        """The loss of the whole batch is [N]."""
        self._losses(seen)

    def measured(self, seen: Evaluated) -> Evaluated:
        """The losses: one that compares samples with each other mixes them, whatever their outputs do.

        Beside them 1: of a loss that is next to 0 roundings are anything.
        """
        losses = self._losses(seen)
        return replace(seen, raw=torch.stack([losses, torch.ones_like(losses)], 1))

    def terms(self, seen: Evaluated) -> Iterator[Term]:
        """The sample's loss."""
        losses = self._losses(seen)
        yield Term(losses.to(op_dtype(losses)).sum())

    def _losses(self, seen: Evaluated) -> Tensor:
        losses = self._loss(logits_or_raw(seen.raw), seen.target)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            what = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(f"the callable loss must return a floating-point tensor [N], got {what}")
        if losses.shape != (seen.size,):
            raise ValueError(
                f"the callable loss must return one loss per sample, shape [{seen.size}], got {list(losses.shape)}. A "
                "scalar has "
                'lost the samples: use reduction="none" and sum each sample over its own positions'
            )
        return losses
