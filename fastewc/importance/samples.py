"""What Fisher and MAS share: batches through the model, their terms into the per-sample sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastewc._dispatch import Impl
from fastewc.importance.batches import Batch, Joined
from fastewc.importance.evaluate import Evaluated, Evaluator
from fastewc.importance.mixing import mixes, refuse_mixing
from fastewc.per_sample import BatchOneSums, PerSampleSums, Term, Unforeseen, zeros_for

_JOINED_BYTES = 1 << 26  # of a joined batch at most
_BY_SAMPLE = ("batch-1", "one backward pass per sample through autograd")
_SOME_BY_SAMPLE = ("batch-1", "the forward did for some of the samples what it did for no others")


class SampleMeasure:
    """A measure that is a sum over samples of |gradient|^power; subclasses say of what the gradient is.

    Batches go through the engine as they are, or in parts that suit the caches. Parameters that it gives up, single
    samples, and everything with impl="reference" go through autograd sample by sample.
    """

    def __init__(
        self, evaluator: Evaluator, parameters: Mapping[str, nn.Parameter], power: int, impl: Impl = "auto"
    ) -> None:
        self._evaluator = evaluator
        for name, parameter in parameters.items():
            if parameter._backward_hooks:
                raise ValueError(
                    f"parameter {name!r} has a hook (register_hook) that may change its gradient, and so the "
                    "importance; remove it for the pass"
                )
        self._parameters, self._power = dict(parameters), power
        self._foreign = evaluator.custom is not None
        self.sums = {name: zeros_for(p) for name, p in parameters.items()}
        self._whole = None if impl == "reference" else self._engine(impl)
        self._single: dict[frozenset[str], BatchOneSums] = {}
        self._waiting: Joined | None = None
        self._alone: Evaluated | None = None  # the first sample, until it is met in company
        self._joinable: int | None = None  # how many samples may be joined, where they come one by one
        self._unforeseen = False  # that some samples had to go one by one, all parameters of them

    def _engine(self, impl: Impl) -> PerSampleSums:
        return PerSampleSums(
            self._evaluator.module, self._parameters, self.sums, self._power, impl, foreign=self._foreign
        )

    def check_evaluated(self, seen: Evaluated) -> None:
        """Raise if an evaluated batch can't be right: all that :meth:`check_samples` and :meth:`terms` look at."""
        raise NotImplementedError

    def check_samples(self, seen: Evaluated) -> None:
        """Raise if the output has lost the samples of a batch; what else could be wrong, :meth:`terms` sees."""

    def measured(self, seen: Evaluated) -> Evaluated:
        """The same, with what is differentiated for its output where that is something else."""
        return seen

    def terms(self, seen: Evaluated) -> Iterator[Term]:
        """The gradients to take for an evaluated batch: each a sum over its samples, of weight 1 if these are many."""
        raise NotImplementedError

    def by_sample(self, batch: Batch) -> bool:
        """True if the terms of this batch can only be formed for one sample at a time."""
        return False

    def check(self, batch: Batch) -> Evaluated:
        """Evaluate the first batch: only in company do a batch-mean loss and a lost batch dimension show."""
        seen = self._evaluator(batch)
        self.check_evaluated(seen)
        return seen

    def watch(self, batch: Batch) -> tuple[Evaluated, Evaluated] | None:
        """Let the engine see how the model uses its parameters: what the first sample and the first two gave."""
        if self._whole is None or batch.size < 2:
            return None
        seen: dict[tuple[int, int], Evaluated] = {}

        def run(start: int, stop: int) -> None:
            seen[start, stop] = self._evaluator(batch.rows(start, stop))

        self._whole.watch(run)
        first, two = seen[0, 1], seen[0, 2]
        with torch.no_grad():  # with random numbers it is another each time
            self._alone = None if self._mixes(first, two) else first
        return first, two

    def add(self, batch: Batch) -> None:
        """Add a batch's samples, now or together with those that follow."""
        capacity = self._capacity(batch)
        if self._waiting is not None and not self._waiting.takes(batch):
            self.finish()
        if self._waiting is None and 2 * batch.size <= capacity and Joined.can_begin(batch):
            self._waiting = Joined(batch, capacity)
        if self._waiting is None:
            self._add(batch)
        else:
            self._waiting.append(batch)

    def finish(self) -> None:
        """Add what is still waiting."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._add(waiting.batch())

    def _capacity(self, batch: Batch) -> int:
        """How many samples to collect, see :meth:`PerSampleSums.joined`.

        On a GPU the batch's size is the user's choice, and so it is where a forward of theirs gets single samples.
        """
        cpu = next(iter(self._parameters.values())).device.type == "cpu"
        if not cpu or self._whole is None or self.by_sample(batch) or (self._foreign and batch.size == 1):
            return 0
        if not self._whole.planned:
            return 2  # two batches of one sample, to find out from
        return min(self._whole.joined(batch.size), _JOINED_BYTES // max(1, Joined.bytes_of(batch)))

    def _add(self, batch: Batch) -> None:
        engine = self._whole
        if engine is None or batch.size == 1 or self.by_sample(batch):
            return self._add_singly(batch, self._parameters.keys())
        if not engine.planned:  # of the first look there was only one sample: it is we who join them
            self._joinable = 1
        if self._joinable is not None and batch.size > self._joinable:
            self._joinable = batch.size
            if not self._may_join(engine, batch):
                self._whole = None
                return self._add_singly(batch, self._parameters.keys())
        start, count = 0, -(-batch.size // engine.chunk())
        for part in range(count):
            stop = batch.size * (part + 1) // count
            self._add_part(engine, batch.rows(start, stop))
            start = stop
        return None

    def _may_join(self, engine: PerSampleSums, batch: Batch) -> bool:
        """True if the model takes samples together that came one by one, and they leave each other's outputs alone."""
        try:
            if not engine.planned:
                self.watch(batch)
                self._alone = None
            with torch.no_grad():
                together = self._evaluator(batch)
                ends = {n: self._evaluator(batch.rows(n, n + 1)) for n in (0, batch.size - 1)}
                return not any(self._mixes(one, together, n) for n, one in ends.items())
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):  # if not for that, each alone says so
            return False

    def _mixes(self, one: Evaluated, together: Evaluated, index: int = 0) -> bool:
        return mixes(self._evaluator.module, self.measured(one), self.measured(together), index)

    def _add_part(self, engine: PerSampleSums, part: Batch) -> None:
        with self.redrawn() as again:
            if not self._added_whole(engine, part):
                self._unforeseen = True
                self._add_singly(part, self._parameters.keys())
            elif engine.given_up:
                again()
                self._add_singly(part, engine.given_up.keys())

    def _added_whole(self, engine: PerSampleSums, part: Batch) -> bool:
        """False, with nothing added, if the model does for these samples what it did for no others."""

        def forward() -> Iterator[Term]:
            seen = self._evaluator(part)
            alone, self._alone = self._alone, None
            if alone is not None:
                with torch.no_grad():
                    refuse_mixing(self._evaluator.module, self.measured(alone), self.measured(seen), "the importances")
            self.check_samples(seen)
            return self.terms(seen)

        for _ in range(2):
            try:
                engine.add(forward, part.size)
                return True
            except Unforeseen:
                if part.size > 1:
                    self.watch(part)
        return False

    def _add_singly(self, batch: Batch, names: Iterable[str]) -> None:
        wanted = frozenset(names)
        if wanted not in self._single:
            parameters = {name: p for name, p in self._parameters.items() if name in wanted}
            self._single[wanted] = BatchOneSums(
                self._evaluator.module, parameters, self._power, foreign=self._foreign, sums=self.sums
            )
        for index in range(batch.size):
            self._single[wanted].add(self.terms(self._evaluator(batch.rows(index, index + 1))))

    @contextmanager
    def redrawn(self) -> Iterator[Callable[[], None]]:
        """Inside, calling what it yields lets the next terms of the same samples draw the same random labels again."""
        yield lambda: None

    @property
    def used(self) -> set[str]:
        """Names of the parameters that some sample's gradient has reached."""
        return {name for one in self._engines() for name in one.used}

    def _engines(self) -> list[PerSampleSums | BatchOneSums]:
        return [*([] if self._whole is None else [self._whole]), *self._single.values()]

    def path(self, name: str) -> tuple[str, str]:
        """(path, reason) of a parameter, for the report."""
        if self._whole is None:
            return _BY_SAMPLE
        if name in self._whole.given_up:
            return "batch-1", self._whole.given_up[name]
        if self._unforeseen:
            return _SOME_BY_SAMPLE
        return self._whole.paths.get(name, _BY_SAMPLE)

    def nothing_measured(self) -> bool:
        """True if there were terms and none of them depended on anything."""
        engines = self._engines()
        return any(one.terms for one in engines) and not any(one.reached for one in engines)


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
