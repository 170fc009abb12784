"""The one pass over the data that Fisher, MAS and SIG share: what it reads, how it stops, what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastewc._dispatch import choose
from fastewc._names import Exclude, trainable_parameters, unwrap
from fastewc.distributed import Ranks
from fastewc.importance.base import Importance, Report
from fastewc.importance.batches import Batch, check_data, read_batch
from fastewc.importance.evaluate import Evaluated, Evaluator, Forward
from fastewc.importance.guards import check_model, kept_buffers, refuse_randomness, undisturbed, wanted_parameters
from fastewc.importance.mixing import refuse_mixing


@dataclass(frozen=True)
class PassOptions:
    """The arguments that every data pass takes; see :func:`fastewc.fisher_importance`."""

    forward: Forward | None
    max_samples: int | None
    impl: str
    verify: bool
    progress: bool
    generator: torch.Generator | None
    process_group: Any
    batch_dim: int
    allow_dropout: bool
    exclude: Exclude

    def checked(self) -> PassOptions:
        """Itself with plain ints; raises for arguments that are wrong whatever the model."""
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"forward must be a callable(model, batch), got {type(self.forward).__name__}")
        for name, value, least in (("max_samples", self.max_samples, 1), ("batch_dim", self.batch_dim, 0)):
            if value is None and name == "max_samples":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(self.generator).__name__}")
        if self.verify:
            raise NotImplementedError(
                "verify=True is not implemented yet: it is for per-sample gradients that come in batches, and today "
                "each sample is differentiated by itself"
            )
        limit = None if self.max_samples is None else int(self.max_samples)
        return replace(self, max_samples=limit, batch_dim=int(self.batch_dim))


class Measure(Protocol):
    """What one kind of importance adds up. ``sums`` are numerators; the pass divides them by N."""

    sums: dict[str, Tensor]
    used: set[str]
    path: str
    reason: str

    def check(self, batch: Batch) -> Evaluated | None:
        """Evaluate the first batch as a whole, without gradients; raise if it can't be right. None: don't cut it."""

    def add(self, batch: Batch) -> None:
        """Add the batch's samples to the sums."""

    def nothing_measured(self) -> bool:
        """After the last batch: True if there were values to differentiate, and none depended on a parameter."""


MakeMeasure = Callable[[Evaluator, Mapping[str, nn.Parameter]], Measure]


def run_pass(model: nn.Module, data: Any, options: PassOptions, method: str, make: MakeMeasure) -> Importance:
    """Ω = (1/N) · Σ over samples, all ranks together, of what ``make``'s measure adds up."""
    # Sums made in inference mode could not be used afterwards. The data keeps the caller's grad mode.
    with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
        return _run_pass(model, data, options, method, make)


def _run_pass(model: nn.Module, data: Any, options: PassOptions, method: str, make: MakeMeasure) -> Importance:
    what = _caller(method)
    device = _device(model)
    ranks = Ranks(options.process_group, device)
    with ranks:  # whatever fails here fails on every rank
        options = options.checked()
        parameters = wanted_parameters(model, options.exclude, what)
        choose("sum_grad_power", options.impl, device)
        check_model(unwrap(model), allow_dropout=options.allow_dropout, what=what)
        ranks.expect_same(
            repr((method, options.max_samples, [(name, tuple(p.shape)) for name, p in parameters.items()]))
        )
        check_data(data)
        evaluator = Evaluator(unwrap(model), options.forward)
        measure = make(evaluator, parameters)
        with undisturbed(evaluator.module):
            samples = _read(data, device, options, ranks.share(options.max_samples), evaluator, measure, what)
        detached = measure.nothing_measured()
    names = list(measure.sums)
    ranks.sum_tensors(measure.sums)
    total, detached_ranks, *users = ranks.sum_counts([samples, int(detached), *(int(n in measure.used) for n in names)])
    if total == 0:
        raise ValueError("data has no samples; a generator can be read only once: was it used up before?")
    if detached_ranks and not any(users):
        raise ValueError(
            "no sample's loss (or output) depends on any trainable parameter: was it detached, computed under "
            "no_grad or turned into a number?"
        )
    for value in measure.sums.values():
        value.div_(total)
    used = {name for name, count in zip(names, users, strict=True) if count}
    idle = "the forward never used it" if used else "no sample had a counted position that it could change"
    report: Report = {name: (measure.path, measure.reason) if name in used else ("unused", idle) for name in names}
    return Importance._of(measure.sums, total, method, report)


def _device(model: Any) -> torch.device:
    """Where the trainable parameters are, the first of them at least."""
    trainable = trainable_parameters(model).values() if isinstance(model, nn.Module) else ()
    return next((parameter.device for parameter in trainable), torch.device("cpu"))


def _caller(method: str) -> str:
    """The public function that a method string comes from, for error texts."""
    return f"{method.partition('/')[0]}_importance"


def _read(
    data: Any,
    device: torch.device,
    options: PassOptions,
    limit: int | None,
    evaluator: Evaluator,
    measure: Measure,
    what: str,
) -> int:
    """Feed up to ``limit`` samples to the measure; returns how many there were."""
    samples = 0
    if limit == 0:
        return samples
    with _bar(options.progress, limit) as advance:
        for raw in data:
            # Per batch, because a generator that yields inside no_grad leaves it switched on for us.
            with torch.enable_grad():
                batch = read_batch(raw, device, options.batch_dim, custom=options.forward is not None)
                if limit is not None and samples + batch.size > limit:
                    batch = batch.rows(0, limit - samples)
                if batch.size and samples == 0:
                    _look_first(evaluator, batch, measure, options.allow_dropout, what)
                if batch.size:
                    measure.add(batch)
            samples += batch.size
            advance(batch.size)
            if limit is not None and samples >= limit:
                break
    return samples


def _look_first(evaluator: Evaluator, batch: Batch, measure: Measure, allow_dropout: bool, what: str) -> None:
    seen: list[Evaluated | None] = []

    def look() -> None:
        with torch.no_grad(), kept_buffers(evaluator.module):
            seen.append(measure.check(batch))
        torch.clear_autocast_cache()

    refuse_randomness(evaluator.module, look, allow=allow_dropout, what=what)
    if not allow_dropout and seen[0] is not None:
        with torch.no_grad(), kept_buffers(evaluator.module):
            refuse_mixing(evaluator, batch, seen[0], what)
        torch.clear_autocast_cache()


@contextmanager
def _bar(wanted: bool, total: int | None) -> Iterator[Callable[[int], object]]:
    if not wanted:
        yield lambda count: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError('progress=True needs tqdm: pip install "fastewc[progress]"') from error
    with tqdm(total=total, unit="sample", desc="importance") as bar:
        yield bar.update
