"""Importance: one non-negative number per weight, by parameter name, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Literal

import torch
from torch import Tensor

from fastewc import _state
from fastewc._names import as_patterns, matches, op_dtype, refuse_dtensor, require_matches

Report = dict[str, tuple[str, str]]
PATHS = ("fused", "op", "batch-1", "unused", "given")
TAKEN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STORED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_KIND = "importance"


def _checked(name: object, value: object) -> Tensor:
    """``value`` detached, as float32 (float64 stays); raises if it cannot be an importance."""
    if not isinstance(name, str):
        raise TypeError(f"an importance is keyed by parameter name (str), got {type(name).__name__}: {name!r}")
    if not isinstance(value, Tensor):
        raise TypeError(f"importance of {name!r} must be a floating-point tensor, got {type(value).__name__}")
    value = value.detach()
    refuse_dtensor({name: value}, "Importance")
    if value.dtype not in TAKEN_DTYPES or value.layout != torch.strided or value.is_meta:
        raise TypeError(
            f"importance of {name!r} must be a dense floating-point tensor of 16 bits or more with data in it, got "
            f"{value.dtype}, layout {value.layout}, device {value.device}"
        )
    _state.check_finite({name: value}, "the importance")
    return value.to(op_dtype(value))


class Importance(dict[str, Tensor]):
    """How much each weight matters: a dict from parameter name to a tensor of the parameter's shape.

    Values are float32 (float64 where float64 was given), finite and >= 0, and are per-sample means: an importance
    from twice the data has the same size. Names are those of the unwrapped model, a tied parameter under its first.

    Attributes:
        num_samples: how many samples the mean is over (1 for uniform, steps for SI).
        method: where it came from, e.g. ``"fisher/categorical/dataset"``.
        report: parameter name to ``(path, reason)``; path is "fused", "op", "batch-1", "unused" or "given".
        metadata: the user's own strings that were saved with the file it was loaded from, else empty.
    """

    num_samples: int
    method: str
    report: Report
    metadata: dict[str, str]

    def __init__(self, mapping: Mapping[str, Tensor], *, num_samples: int, method: str) -> None:
        """Take importances computed anywhere else. The tensors are copied.

        Args:
            mapping: parameter name to floating-point tensor, finite and >= 0.
            num_samples: number of samples the values are a mean over, >= 0; the weight in :meth:`merge`.
            method: a word or two saying what they are.

        Raises:
            TypeError: a name that is not a str, a value that is not a dense floating-point tensor of at least 16 bits,
                a bad num_samples or method.
            ValueError: NaN, infinite or negative entries (the parameter is named), num_samples < 0.
            NotImplementedError: a DTensor.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(f"Importance takes a mapping from parameter name to tensor, got {type(mapping).__name__}")
        values: dict[str, Tensor] = {}
        for name, value in mapping.items():
            checked = _checked(name, value)
            shares = isinstance(value, Tensor) and checked.data_ptr() == value.data_ptr()
            values[name] = checked.clone() if shares else checked
        self._fill(values, num_samples, method, dict.fromkeys(values, ("given", "passed in as a mapping")))

    @classmethod
    def _of(cls, values: Mapping[str, Tensor], num_samples: int, method: str, report: Report) -> Importance:
        """Wrap tensors that the package itself has just made: checked, but not copied."""
        made = cls.__new__(cls)
        made._fill({name: _checked(name, value) for name, value in values.items()}, num_samples, method, report)
        return made

    def _fill(self, values: Mapping[str, Tensor], num_samples: int, method: str, report: Report) -> None:
        if isinstance(num_samples, bool) or not isinstance(num_samples, Integral):
            raise TypeError(f"num_samples must be an int, got {type(num_samples).__name__}: {num_samples!r}")
        if num_samples < 0:
            raise ValueError(f"num_samples must be >= 0, got {num_samples}")
        if not isinstance(method, str):
            raise TypeError(f"method must be a str, got {type(method).__name__}: {method!r}")
        dict.__init__(self, values)
        self.num_samples, self.method, self.report, self.metadata = int(num_samples), method, dict(report), {}

    def _with(self, values: Mapping[str, Tensor], report: Report | None = None) -> Importance:
        """Other values (and report), everything else as here."""
        made = Importance._of(values, self.num_samples, self.method, self.report if report is None else report)
        made.metadata = dict(self.metadata)
        return made

    def copy(self) -> Importance:
        """A new Importance over the same tensors (as ``dict.copy``)."""
        return self._with(self)

    def __repr__(self) -> str:
        """Size and origin; the tensors themselves would fill pages."""
        weights = sum(value.numel() for value in self.values())
        return (
            f"Importance({len(self)} parameters, {weights} weights, method={self.method!r}, "
            f"num_samples={self.num_samples})"
        )

    def merge(self, other: Importance) -> Importance:
        """The importance over both sets of samples: (N₁Ω₁ + N₂Ω₂)/(N₁ + N₂).

        Args:
            other: an Importance with the same names and shapes; moved to this one's devices.

        Returns:
            A new Importance with N₁ + N₂ samples; differing methods become ``"a+b"``; metadata of both, this one's
            where both have a key.

        Raises:
            TypeError: ``other`` is not an Importance.
            ValueError: names or shapes differ, or both have zero samples.
        """
        if not isinstance(other, Importance):
            raise TypeError(
                f"merge takes another Importance, got {type(other).__name__}; wrap it: Importance(..., num_samples=...)"
            )
        if self.keys() != other.keys():
            differing = ", ".join(sorted(self.keys() ^ other.keys())[:8])
            raise ValueError(f"merge needs the same parameter names in both; only one of them has: {differing}")
        total = self.num_samples + other.num_samples
        if total == 0:
            raise ValueError("merge weights by num_samples, and both have num_samples = 0")
        values, report = {}, {}
        for name, mine in self.items():
            theirs = other[name].to(mine.device)
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"merge: {name!r} has shape {tuple(mine.shape)} here and {tuple(theirs.shape)} in the other"
                )
            values[name] = mine * (self.num_samples / total) + theirs * (other.num_samples / total)
            unused = self.report.get(name, ("given", ""))[0] == "unused"
            report[name] = (other if unused else self).report.get(name, ("given", "merged"))
        methods = dict.fromkeys([*self.method.split("+"), *other.method.split("+")])
        made = Importance._of(values, total, "+".join(methods), report)
        made.metadata = {**other.metadata, **self.metadata}
        return made

    def normalize(self, by: Literal["mean", "max", "trace"] = "mean") -> Importance:
        """Divide everything by one number, so that λ means the same for different models and methods.

        Args:
            by: over all weights of all parameters together, what becomes 1: their "mean", their "max" or their sum
                ("trace").

        Raises:
            ValueError: an unknown ``by``, or an importance that is zero everywhere.
        """
        if by not in ("mean", "max", "trace"):
            raise ValueError(f"normalize knows 'mean', 'max' and 'trace', got {by!r}")
        filled = [value for value in self.values() if value.numel()]
        if by == "max":
            size = max((value.max().item() for value in filled), default=0.0)
        else:
            size = math.fsum(value.sum(dtype=torch.float64).item() for value in filled)
            size /= sum(value.numel() for value in filled) if by == "mean" and filled else 1
        if size == 0:
            raise ValueError(f"normalize({by!r}): the importance is zero everywhere, there is nothing to divide by")
        return self._with({name: (value.double() / size).to(value.dtype) for name, value in self.items()})

    def scale(self, factors: Mapping[str, float]) -> Importance:
        """Multiply parameters by factors: ``imp.scale({"head.*": 0.0, "*.bias": 0.5})``.

        Args:
            factors: fnmatch pattern to factor (finite, >= 0); the first pattern that matches a name wins, other names
                stay.

        Raises:
            TypeError: not a mapping, a factor that is not a number.
            ValueError: a pattern that matches nothing, a factor that is negative or not finite, or so large that the
                result is.
        """
        if not isinstance(factors, Mapping):
            raise TypeError(f"scale takes a mapping from pattern to factor, got {type(factors).__name__}")
        patterns = as_patterns(factors)
        for pattern, factor in factors.items():
            if isinstance(factor, bool) or not isinstance(factor, Real):
                raise TypeError(f"scale: the factor of {pattern!r} must be a number, got {type(factor).__name__}")
            if not math.isfinite(factor) or factor < 0:
                raise ValueError(f"scale: the factor of {pattern!r} must be finite and >= 0, got {factor}")
        require_matches(self, patterns, what="scale")
        values = {}
        for name, value in self.items():
            first = next((pattern for pattern in patterns if matches(name, (pattern,))), None)
            values[name] = value.clone() if first is None else value * float(factors[first])
            if not bool(torch.isfinite(values[name]).all()):
                raise ValueError(f"scale: {name!r} times {factors[first or name]} is too large for {value.dtype}")
        return self._with(values)

    def rename(self, names: Mapping[str, str]) -> Importance:
        """Change parameter names: ``imp.rename({"fc.weight": "classifier.weight"})``; the order stays.

        Raises:
            TypeError: not a mapping of str to str.
            ValueError: an old name that is not there, or two parameters that would share a name.
        """
        if not isinstance(names, Mapping) or not all(isinstance(new, str) for new in names.values()):
            raise TypeError("rename takes a mapping from old name (str) to new name (str)")
        new_name = _state.renamer(self, names)
        values = {new_name[name]: value.clone() for name, value in self.items()}
        report = {new_name[name]: self.report.get(name, ("given", "renamed")) for name in self}
        return self._with(values, report)

    def save(
        self, path: str | PathLike[str], *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file with method, sample count and report in its header.

        Args:
            path: the file; replaced atomically if it exists.
            dtype: how the values are stored: None as they are, torch.float32, torch.float64 or torch.bfloat16
                (relative error 2⁻⁸; loads as float32).
            metadata: strings of your own; after :meth:`load` they are in ``.metadata``.

        Raises:
            ValueError: a dtype whose range is too small for importances (float16, float8), or one that is no float; a
                parameter named "__metadata__", which safetensors keeps for itself.
            TypeError: metadata that is not a mapping of str to str.
            OverflowError: a float64 value above the largest number of ``dtype``.
        """
        from fastewc.files import save_tensors

        if dtype is not None and dtype not in STORED_DTYPES:
            raise ValueError(
                f"dtype must be torch.float32, torch.float64 or torch.bfloat16, got {dtype}: importances span twelve "
                "decades, which float16 and float8 cut to zero or infinity"
            )
        if "__metadata__" in self:
            raise ValueError("a safetensors file can't hold a tensor named '__metadata__'; rename() it first")
        words = {} if metadata is None else metadata
        if not isinstance(words, Mapping) or not all(isinstance(w, str) for pair in words.items() for w in pair):
            raise TypeError("metadata must be a mapping from str to str")
        tensors = {name: value if dtype is None else value.to(dtype) for name, value in self.items()}
        for name, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise OverflowError(f"importance of {name!r} does not fit into {dtype}; save it in a wider dtype")
        header = {
            "num_samples": self.num_samples,
            "method": self.method,
            "report": {name: list(entry) for name, entry in self.report.items()},
            "metadata": dict(words),
        }
        save_tensors(path, tensors, header, _KIND)

    @classmethod
    def load(cls, path: str | PathLike[str], *, device: torch.device | str = "cpu") -> Importance:
        """Read a file written by :meth:`save`, on any machine, onto ``device``.

        Raises:
            ValueError: the file is truncated, damaged or foreign, holds something else than an importance, or values
                that can't be one (NaN, negative); the path is named.
            FileNotFoundError: there is no such file.
        """
        from fastewc.files import load_tensors

        tensors, header = load_tensors(path, _KIND, device)
        try:
            report = {name: _report_entry(name, entry) for name, entry in header["report"].items()}
            metadata = {str(key): str(value) for key, value in header["metadata"].items()}
            ordered = {name: tensors[name] for name in header["tensors"]}  # safetensors sorts by name
            made = cls._of(ordered, header["num_samples"], header["method"], report)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}: not a complete importance file (missing or malformed: {error}); was it damaged?"
            ) from error
        made.metadata = metadata
        return made


def _report_entry(name: str, entry: object) -> tuple[str, str]:
    """A (path, reason) as JSON has it, checked."""
    if isinstance(entry, list) and len(entry) == 2 and entry[0] in PATHS and isinstance(entry[1], str):
        return entry[0], entry[1]
    raise ValueError(f"report of {name!r} is {entry!r}, wanted [path, reason]")
