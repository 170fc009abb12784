"""What an EWC object keeps, and the pure functions that check it, fold tasks into it and fit it to a model.

Nothing here changes its arguments: a caller computes the new state first and takes it over when all of it is right.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastewc import _storage
from fastewc._names import as_patterns, is_dtensor, matches, op_dtype
from fastewc._storage import ANCHOR_DTYPES, IMPORTANCE_DTYPES, Held
from fastewc.ops.importance_codes import Codes

VARIANTS = ("plain", "stabilized", "proximal", "wva")
ANCHORS = ("latest", "weighted")


def names(items: Iterable[str], most: int = 8) -> str:
    """The first few names, comma-separated, for an error text."""
    items = list(items)
    return ", ".join(items[:most]) + (f", … ({len(items)} in all)" if len(items) > most else "")


def listing(*kinds: tuple[str, list[str]]) -> str:
    """Turn (kind, names) pairs into "missing: a, b; unknown: c", without the empty kinds."""
    return "; ".join(f"{kind}: {names(found)}" for kind, found in kinds if found)


def checked_lambda(value: Any) -> float:
    """λ as a float; TypeError unless it is a number, ValueError unless it is finite and ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"ewc_lambda must be a number, got {type(value).__name__}: {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"ewc_lambda must be finite and >= 0, got {value!r}")
    return number


def checked_lr(value: Any) -> float | Tensor:
    """α as given; TypeError unless it is a number or a tensor of one element, ValueError if a number is negative."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"lr must be a number or a tensor of one element, got shape {tuple(value.shape)}")
        return value.detach().reshape(())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"lr must be a float, a tensor or a torch optimizer, got {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"lr must be finite and >= 0, got {value!r}")
    return number


@dataclass
class Options:
    """How tasks are folded and applied; checked on construction."""

    ewc_lambda: float
    variant: str
    gamma: float
    anchor: str
    importance_dtype: torch.dtype = torch.float32
    anchor_dtype: torch.dtype | None = None
    offload: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.offload, bool):
            raise TypeError(f"offload must be True or False, got {self.offload!r}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.anchor not in ANCHORS:
            raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {self.anchor!r}")
        if isinstance(self.gamma, bool) or not (isinstance(self.gamma, Real) and 0 <= float(self.gamma) <= 1):
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma!r}")
        if self.importance_dtype not in IMPORTANCE_DTYPES:
            raise ValueError(
                f"importance_dtype must be torch.float32, torch.bfloat16 or torch.uint8, got {self.importance_dtype!r}"
            )
        if self.anchor_dtype not in ANCHOR_DTYPES:
            raise ValueError(
                f"anchor_dtype must be None, torch.float32, torch.float64 or torch.bfloat16, got {self.anchor_dtype!r}"
            )

    def follow(self, held: Held, parameter: Tensor) -> Held:
        """Ω̄ and w* where and as the parameter and these options want them; the same objects where they are so."""
        return _storage.follow(held, parameter, self.importance_dtype, self.anchor_dtype, self.offload)

    def check_anchor_storage(self, parameters: Mapping[str, Tensor]) -> None:
        """A running mean would stall under rounding to nearest, and float16 has no other here: refuse it."""
        low = [n for n, p in parameters.items() if (self.anchor_dtype or p.dtype) == torch.float16]
        if self.anchor == "weighted" and low:
            raise NotImplementedError(
                f"anchor='weighted' with float16 anchors is not implemented ({names(low)}); give "
                "anchor_dtype=torch.float32 or torch.bfloat16"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able; ``anchor`` is "anchor_kind" here, since "anchor" holds the tensors."""
        found = asdict(self)
        found["anchor_kind"] = found.pop("anchor")
        found["importance_dtype"] = str(self.importance_dtype).removeprefix("torch.")
        found["anchor_dtype"] = None if self.anchor_dtype is None else str(self.anchor_dtype).removeprefix("torch.")
        found["exclude"] = list(self.exclude)
        return found

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Options:
        """The inverse of :meth:`as_dict`; ValueError names a key that is missing."""
        require_keys(
            state,
            ("ewc_lambda", "variant", "gamma", "anchor_kind", "importance_dtype", "anchor_dtype", "exclude"),
        )
        return cls(
            ewc_lambda=checked_lambda(state["ewc_lambda"]),
            variant=state["variant"],
            gamma=state["gamma"],
            anchor=state["anchor_kind"],
            importance_dtype=_dtype(state["importance_dtype"]),
            anchor_dtype=None if state["anchor_dtype"] is None else _dtype(state["anchor_dtype"]),
            offload=state.get("offload", False),  # absent from older files
            exclude=as_patterns(state["exclude"]),
        )


@dataclass
class Importances:
    """Where Ω̄ comes from: how many tasks and samples, and by which methods."""

    num_tasks: int = 0
    num_samples: int = 0
    methods: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The methods of all tasks, each once, joined by "+"."""
        return "+".join(self.methods) or "none"

    def add(self, importance: Mapping[str, Tensor]) -> None:
        """Count one more task."""
        method = getattr(importance, "method", "given")
        self.num_tasks += 1
        self.num_samples += getattr(importance, "num_samples", 1)
        self.methods += [] if method in self.methods else [method]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Importances:
        """The inverse of :meth:`as_dict`; ValueError names a key that is missing."""
        require_keys(state, ("num_tasks", "num_samples", "methods"))
        counts = [state["num_tasks"], state["num_samples"]]
        if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(state["methods"], list):
            raise ValueError(f"damaged state: num_tasks and num_samples must be whole numbers >= 0, got {counts}")
        return cls(counts[0], counts[1], [str(m) for m in state["methods"]])


@dataclass
class Changes:
    """What :meth:`fastewc.EWC.rebind` did: names that joined, grew, were dropped, or whose anchor lost precision."""

    added: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    narrowed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        return listing(*vars(self).items()) or "no change"

    def warn(self) -> None:
        """Name what changed, as a UserWarning; nothing if nothing did."""
        if self:
            warnings.warn(f"ewc now fits the model: {self}", UserWarning, stacklevel=3)


def require_keys(state: Mapping[str, Any], keys: Iterable[str]) -> None:
    """ValueError if a key of a state dict or file header is missing."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"this is no state of an EWC object: missing {', '.join(missing)}")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {name!r} in the saved state")
    return found


def tensors_of(state: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    """state[key] as name → tensor; ValueError or TypeError if it is none."""
    require_keys(state, (key,))
    found = state[key]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise TypeError(f"state[{key!r}] must map names to tensors")
    return dict(found)


def require_finite(named: Mapping[str, Tensor], what: str) -> None:
    """ValueError naming the first parameter with a NaN or infinite value."""
    for name, value in named.items():
        if value.numel() == 0:
            continue
        low, high = value.aminmax()  # NaN where there is one, and unlike isfinite without temporaries
        if not bool(low.isfinite() & high.isfinite()):
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinite"
            raise ValueError(f"{what} of {name!r} has {kind} values; it must be finite")


def check_finite(named: Mapping[str, Tensor], what: str) -> None:
    """ValueError naming the first parameter whose importance is NaN, infinite or negative."""
    for name, value in named.items():
        if value.numel() == 0:
            continue
        low, high = value.aminmax()  # NaN where there is one; one pass, and one wait on a GPU
        if bool((low >= 0) & (high < math.inf)):
            continue
        require_finite({name: value}, what)
        if bool((value < 0).any()):
            raise ValueError(
                f"{what} of {name!r} has negative values (minimum {value.min().item():g}); it must be finite and >= 0"
            )


def checked_importance(
    importance: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    exclude: tuple[str, ...],
    present: Mapping[str, Tensor],
    *,
    strict: bool,
) -> dict[str, Tensor]:
    """The importance of every protected parameter, as it was given; see EWC.consolidate for the errors.

    Values are not looked at; zeros stand for a missing one.

    ``present`` are all of the model's parameters, frozen ones too: they only make the error text say more.
    """
    if not all(isinstance(name, str) for name in importance):
        raise TypeError("the importance must be keyed by parameter name (str)")
    given = {n: t for n, t in importance.items() if not matches(n, exclude)}
    missing = [n for n in parameters if n not in given]
    unknown = [n for n in given if n not in parameters]
    if unknown or (strict and missing):
        late = [n for n in unknown if n in present and present[n].requires_grad]
        frozen = [n for n in (*unknown, *missing) if n in present and not present[n].requires_grad]
        hint = ""
        if late:
            hint += f" ({names(late)} joined the model after the first task: ewc.rebind(strict=False) takes them in)"
        if frozen:
            hint += (
                f" ({names(frozen)} do not require a gradient: ewc protects trainable parameters only, on a PEFT "
                "model the adapters; protecting frozen base weights through LoRA is not available yet)"
            )
        raise ValueError(
            "the importance does not fit the model: "
            + listing(("missing", missing if strict else []), ("unknown", unknown))
            + hint
            + ". Names must be those of the unwrapped model; strict=False lets a missing name add 0; "
            "Importance.rename and EWC(exclude=…) adapt the rest."
        )
    found = {}
    for name, parameter in parameters.items():
        value = given.get(name)
        if value is None:
            found[name] = torch.zeros((), device=parameter.device).expand(parameter.shape)
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"the importance of {name!r} must be a floating-point tensor, got {got}")
        if value.layout != torch.strided or value.is_meta:
            raise TypeError(
                f"the importance of {name!r} must be a dense tensor with values, got {value.layout} on {value.device}"
            )
        if is_dtensor(value):
            raise NotImplementedError(
                f"the importance of {name!r} is a DTensor; DTensor support is not implemented yet"
            )
        if value.shape != parameter.shape:
            raise ValueError(
                f"the importance of {name!r} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
            )
        found[name] = value.detach()
    return found


def importances_of(state: Mapping[str, Any]) -> dict[str, Tensor | Codes]:
    """Ω̄ of a state dict by name, codes joined with their scales; ValueError or TypeError where they do not belong."""
    found: dict[str, Tensor | Codes] = {}
    scales = tensors_of({"importance_scales": {}, **state}, "importance_scales")
    held = tensors_of(state, "importance")
    coded = {name for name, tensor in held.items() if tensor.dtype == torch.uint8}
    odd = sorted(coded ^ scales.keys())
    if odd:
        raise ValueError(f"uint8 importances and importance_scales must have the same names; not so: {names(odd)}")
    for name, tensor in held.items():
        found[name] = Codes(tensor, scales[name]) if name in scales else tensor
    for name, omega in found.items():
        if isinstance(omega, Codes):
            omega.check(name)
    return found


def fit(
    importance: Mapping[str, Tensor | Codes],
    anchor: Mapping[str, Tensor],
    named: Mapping[str, Tensor],
    options: Options,
    *,
    rename: Mapping[str, str] | None,
    strict: bool,
) -> tuple[dict[str, Tensor | Codes], dict[str, Tensor], Changes]:
    """Ω̄ and w* for the parameters ``named``: copies of the given ones, renamed; rules and errors of EWC.rebind."""
    if importance.keys() != anchor.keys():
        raise ValueError(
            "importance and anchor have different names: "
            + listing(("only one has", sorted(importance.keys() ^ anchor.keys())))
        )
    new_name = renamer(importance, rename)
    importance = {new_name[n]: omega for n, omega in importance.items()}
    anchor = {new_name[n]: star for n, star in anchor.items()}
    changes = Changes(dropped=[n for n in importance if n not in named])
    out_importance: dict[str, Tensor | Codes] = {}
    out_anchor: dict[str, Tensor] = {}
    for name, p in named.items():
        dtype = options.anchor_dtype or p.dtype
        if name not in importance:
            changes.added.append(name)
            zeros = torch.zeros_like(p, dtype=op_dtype(p), requires_grad=False)
            zeros_held = _storage.store_importance(zeros, options.importance_dtype, parameter=p)
            out_importance[name], out_anchor[name] = options.follow((zeros_held, p.detach().to(dtype, copy=True)), p)
            continue
        omega, star = importance[name], anchor[name]
        kinds_fit = isinstance(omega, Codes) or omega.is_floating_point()
        if not (kinds_fit and star.is_floating_point()) or omega.shape != star.shape:
            raise ValueError(f"the saved importance and anchor of {name!r} are not two float tensors of one shape")
        if star.ndim != p.ndim or any(old > new for old, new in zip(omega.shape, p.shape, strict=True)):
            raise ValueError(
                f"{name!r} has shape {tuple(p.shape)} now and was {tuple(omega.shape)}: a parameter may grow, never "
                "shrink"
            )
        if omega.shape != p.shape:
            changes.grown.append(name)
        if torch.promote_types(star.dtype, dtype) != dtype:
            changes.narrowed.append(name)
        held = _storage.grown(omega, star, p, options.importance_dtype, dtype)
        out_importance[name], out_anchor[name] = options.follow(held, p)
    if strict and changes:
        problems = listing(
            ("missing", changes.added),
            ("unknown", changes.dropped),
            ("grown", changes.grown),
            ("anchors would lose precision", changes.narrowed),
        )
        raise ValueError(
            f"what is held does not fit the model: {problems}. strict=False takes the model's parameters as they are "
            "(new ones join with importance 0); rename={old: new} follows renamed ones."
        )
    return out_importance, out_anchor, changes


def renamer(held: Iterable[str], rename: Mapping[str, str] | None) -> dict[str, str]:
    """Old → new for every held name; ValueError for an unknown old name or two that meet."""
    held, rename = list(held), dict(rename or {})
    unknown = [old for old in rename if old not in held]
    if unknown:
        raise ValueError(f"rename: {names(unknown)} is not held; held are {names(held)}")
    new = {name: rename.get(name, name) for name in held}
    if len(set(new.values())) != len(new):
        twice = sorted({n for n in new.values() if list(new.values()).count(n) > 1})
        raise ValueError(f"rename: two names would become {names(twice)}")
    return new
