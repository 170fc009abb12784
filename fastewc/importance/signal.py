"""Total absolute signal (SIG): how much passes through each weight of linear and convolutional layers (equation E8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastewc._names import Exclude, op_dtype
from fastewc.importance.base import Importance
from fastewc.importance.batches import Batch
from fastewc.importance.data_pass import PassOptions, run_pass
from fastewc.importance.evaluate import Evaluated, Evaluator, Forward, ignored, logits_or_raw
from fastewc.importance.signal_capture import Capture


def signal_importance(
    model: nn.Module,
    data: Any,
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
    """Total absolute signal (Kutalev and Lapina 2021, arXiv 2109.10021), equation E8.

    Weight: Ω_oi = (1/N) Σ_n Σ_t |w_oi · a_nti|, a the layer's inputs, t the positions that share the weight. Bias:
    (1/N) Σ_n Σ_t of the absolute value of its unit's output: after the elementwise activation, if one follows the layer
    directly or through norms only, else of the output itself; after a softmax where its result is the model's returned
    tensor. An activation follows directly if it is one function (or a module of transformers.activations) and nothing
    else reads or writes what lies between: behind a residual branch or a hand-written y·σ(y) the layer's own output
    counts. No gradients are taken: a pass costs about two forwards.

    Defined for linear and convolutional layers (also transposed, and Hugging Face's Conv1D), called as modules or as
    functions. Any other use of a trainable parameter raises, unless that parameter is excluded.

    Args:
        model: any module; DDP, torch.compile and checkpoint wrappers are looked through. Call ``model.eval()`` first.
        data: an iterable of batches, as in :func:`fastewc.fisher_importance`; targets are not needed. Positions of
            [N, T, ·] inputs of linear layers (or [T, N, ·], or flattened [N·T, ·]) and of the outputs of convolutions
            do not count where the target of shape [N, T] is −100, or without labels where attention_mask is 0; a
            sample whose target [N] is −100 does not count at all. All stay in N.
        forward: as in :func:`fastewc.fisher_importance`, as are all arguments below; runs twice per batch.
        max_samples: use the first so many samples.
        impl: the implementation; an explicit one that can't run raises.
        verify: first compare two samples in one batch with the same two one by one, and raise if they differ.
        progress: show a tqdm bar.
        generator: accepted for symmetry; SIG draws nothing.
        process_group: the ranks to sum over.
        batch_dim: which dimension counts samples.
        allow_dropout: run with active dropout instead of refusing it.
        exclude: fnmatch pattern(s) of parameter names to leave out, e.g. ``("*norm*", "*embedding*")``.

    Returns:
        Importance by parameter name, float32 (float64 for float64 parameters), method "signal".

    Raises:
        NotImplementedError: parameters are used by something else than a linear or convolutional layer (all are named);
            positions that do not count meet a convolution of other positions; an impl that can't run,
            DTensor or FSDP1 parameters.
        ValueError: a batch or model that the pass can't read.
        TypeError: arguments or batches of the wrong type.
        RuntimeError: another rank failed; verify=True found a difference.
    """
    options = PassOptions(
        forward, max_samples, impl, verify, progress, generator, process_group, batch_dim, allow_dropout, exclude
    )
    return run_pass(model, data, options, "signal", Signal)


class Signal:
    """Sums of absolute signals, whole batches at a time: they are sums over samples already."""

    def __init__(self, evaluator: Evaluator, parameters: Mapping[str, nn.Parameter]) -> None:
        self._evaluator = evaluator
        self._parameters = dict(parameters)
        self.sums = {
            name: torch.zeros_like(p, dtype=op_dtype(p), requires_grad=False) for name, p in parameters.items()
        }
        self.used: set[str] = set()

    def path(self, name: str) -> tuple[str, str]:
        """The same for all."""
        return "op", "inputs and outputs of each linear or convolutional call, caught at the function"

    def watch(self, batch: Batch) -> tuple[Evaluated, Evaluated] | None:
        """Nothing to find out before."""
        return None

    def check(self, batch: Batch) -> Evaluated | None:
        """Run the batch once, to see whether the forward draws random numbers or mixes samples."""
        seen = self._evaluator(batch)
        return seen if self._evaluator.custom is None else None  # whole batches do for a custom forward

    def measured(self, seen: Evaluated) -> Evaluated:
        """The output says enough."""
        return seen

    def nothing_measured(self) -> bool:
        """There is nothing to differentiate here."""
        return False

    def finish(self) -> None:
        """Nothing waits."""

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run the counted samples of a batch and add what passes through each weight."""
        target, mask = self._evaluator.target(batch)
        source = self._evaluator.encoder_mask(batch)
        masks = [None if target is None else ~ignored(target)]
        masks += [None if one is None else one != 0 for one in (mask, source)]
        for start, stop in _counted_runs(target, batch.size):
            keeps = [_positions(keep, batch, start, stop) for keep in masks]
            # T = N would hide whether a layer sees [N, T, ·] or [T, N, ·]: one sample less tells.
            square = any(keep is not None and keep.shape[0] == keep.shape[1] > 1 for keep in keeps)
            for first, last in ((start, start + 1), (start + 1, stop)) if square else ((start, stop),):
                self._add(batch.rows(first, last), [_positions(keep, batch, first, last) for keep in masks])

    def _add(self, batch: Batch, masks: list[Tensor | None]) -> None:
        *outputs, source = masks
        ours = next((keep for keep in outputs if keep is not None), None)  # labels decide where there are any
        if ours is not None and source is not None and ours.shape == source.shape and not torch.equal(ours, source):
            raise NotImplementedError(
                "signal_importance of an encoder-decoder whose source and target have the same length: which of the "
                "two masks belongs to a layer can't be told from shapes. Pad one side by one more position"
            )
        capture = Capture(self._evaluator.module, self._parameters, [keep for keep in masks if keep is not None])
        with capture:
            seen = self._evaluator(batch)
        capture.finish([seen.raw, logits_or_raw(seen.raw)])
        for name, value in capture.sums.items():
            self.sums[name] += value
            self.used.add(name)


def _counted_runs(target: Tensor | None, size: int) -> Iterator[tuple[int, int]]:
    """Runs of consecutive samples to run together: all, but for samples whose one target is −100."""
    if target is None or target.ndim != 1 or target.shape[0] != size:
        yield 0, size
        return
    start = None
    for index, counts in enumerate([*(~ignored(target)).tolist(), False]):
        if counts and start is None:
            start = index
        elif not counts and start is not None:
            yield start, index
            start = None


def _positions(tensor: Tensor | None, batch: Batch, start: int, stop: int) -> Tensor | None:
    """The same samples of a target or mask; None for one number per sample, which says nothing about positions."""
    if tensor is None or tensor.ndim < 2:
        return None
    dim = batch.dim(tensor)
    return tensor if dim is None else tensor.narrow(dim, start, stop - start)
