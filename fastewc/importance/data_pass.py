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
from fastewc.importance.guards import (
    check_model,
    kept_buffers,
    refuse_randomness,
    undisturbed,
    unwritten,
    wanted_parameters,
)
from fastewc.importance.mixing import computes_narrow, refuse_mixing
from fastewc.importance.verify import compare_with_single_samples


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
        if self.verify and self.generator is not None and self.generator.device.type != "cpu":
            raise NotImplementedError(
                "verify=True with a generator on a GPU, which draws other numbers for one sample than for two; give a "
                "CPU generator"
            )
        limit = None if self.max_samples is None else int(self.max_samples)
        return replace(self, max_samples=limit, batch_dim=int(self.batch_dim))


#: The ways a parameter's importance is computed, from the fastest to the slowest.
PATHS = ("fused", "op", "batch-1")


class Measure(Protocol):
    """What one kind of importance adds up. ``sums`` are numerators; the pass divides them by N."""

    sums: dict[str, Tensor]

    @property
    def used(self) -> set[str]:
        """Names of the parameters that took part."""

    def path(self, name: str) -> tuple[str, str]:
        """(path, reason) of one that took part, for the report."""

    def watch(self, batch: Batch) -> tuple[Evaluated, Evaluated] | None:
        """Run the first samples of the first batch: what one alone and two together gave. None: use :meth:`check`."""

    def check(self, batch: Batch) -> Evaluated | None:
        """Evaluate the first batch as a whole, without gradients; raise if it can't be right. None: don't cut it."""

    def measured(self, seen: Evaluated) -> Evaluated:
        """The same, with what is differentiated for its output where that is something else."""

    def add(self, batch: Batch) -> None:
        """Add the batch's samples to the sums, at once or at the latest in :meth:`finish`."""

    def finish(self) -> None:
        """There are no more batches."""

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

        with undisturbed(evaluator.module), unwritten(evaluator.module, what) as refuse_writes:

            def look(batch: Batch) -> None:
                _look_first(evaluator, batch, measure, options.allow_dropout, what)
                refuse_writes()
                if options.verify:
                    narrow = computes_narrow(evaluator.module, device)
                    compare_with_single_samples(
                        lambda: make(evaluator, parameters), batch, narrow=narrow, generator=options.generator,
                        what=what,
                    )  # fmt: skip

            samples = _read(data, device, options, ranks.share(options.max_samples), measure, look)
        detached = measure.nothing_measured()
    names = list(measure.sums)
    ranks.sum_tensors(measure.sums)
    took = [measure.path(name)[0] if name in measure.used else None for name in names]
    counts = [int(path == one) for path in took for one in PATHS]
    total, detached_ranks, *users = ranks.sum_counts([samples, int(detached), *counts])
    if total == 0:
        raise ValueError("data has no samples; a generator can be read only once: was it used up before?")
    if detached_ranks and not any(users):
        raise ValueError(
            "no sample's loss (or output) depends on any trainable parameter: was it detached, computed under "
            "no_grad or turned into a number?"
        )
    for value in measure.sums.values():
        value.div_(total)
    return Importance._of(measure.sums, total, method, _report(measure, names, users))


def _report(measure: Measure, names: list[str], users: list[int]) -> Report:
    """The path of every parameter, the slowest on any rank; ``users``: how many ranks took which, PATHS by name."""
    idle = "the forward never used it" if any(users) else "no sample had a counted position that it could change"
    report: Report = {}
    for i, name in enumerate(names):
        taken = [path for path, count in zip(PATHS, users[i * len(PATHS) :], strict=False) if count]
        here, reason = measure.path(name)
        if not taken:
            report[name] = "unused", idle
        else:
            report[name] = taken[-1], reason if here == taken[-1] and name in measure.used else "on another rank"
    return report


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
    measure: Measure,
    look: Callable[[Batch], None],
) -> int:
    """Feed up to ``limit`` samples to the measure, the first batch to ``look`` before; returns how many there were."""
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
                    look(batch)
                if batch.size:
                    measure.add(batch)
            samples += batch.size
            advance(batch.size)
            if limit is not None and samples >= limit:
                break
    with torch.enable_grad():
        measure.finish()
    return samples


def _look_first(evaluator: Evaluator, batch: Batch, measure: Measure, allow_dropout: bool, what: str) -> None:
    seen: list[tuple[Evaluated | None, Evaluated | None]] = []

    def look() -> None:
        with kept_buffers(evaluator.module):
            watched = measure.watch(batch)
            if watched is None:
                with torch.no_grad():
                    seen.append((None, measure.check(batch)))
            else:
                seen.append(watched)
        torch.clear_autocast_cache()

    refuse_randomness(evaluator.module, look, allow=allow_dropout, what=what)
    alone, together = seen[0]
    if not allow_dropout and together is not None:
        with torch.no_grad(), kept_buffers(evaluator.module):
            alone = evaluator(batch.rows(0, 1)) if alone is None and together.size > 1 else alone
            if alone is not None:
                refuse_mixing(evaluator.module, measure.measured(alone), measure.measured(together), what)
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
