"""Which parameters a model has and what they are called, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Exclude = str | Iterable[str]

# A wrapper keeps the wrapped module in one attribute. Recognised by the class that defines it, since a user's own
# submodule may be called "module" as well. Looked up by name so that nothing heavy is imported for a plain model.
_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
    ): "_checkpoint_wrapped_module",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "OffloadWrapper",
    ): "_checkpoint_wrapped_module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
}


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel, torch.compile, checkpoint and averaging wrappers (any number of them)."""
    while True:
        for cls in type(module).__mro__:
            attribute = _WRAPPERS.get((cls.__module__, cls.__name__))
            if attribute is not None:
                module = getattr(module, attribute)
                break
        else:
            return module


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield prefix, module
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", seen)


def model_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter, frozen ones included, under the name it has in the unwrapped model.

    A parameter that several modules share (a tie) appears once, under its first name. Order and names are those of
    ``model.named_parameters()`` on the unwrapped model.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in _walk(model, "", set()):
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found[prefix + name] = parameter
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of :func:`model_parameters` that require a gradient."""
    return {name: p for name, p in model_parameters(model).items() if p.requires_grad}


def as_patterns(exclude: Exclude) -> tuple[str, ...]:
    """``exclude`` as a tuple of fnmatch patterns; one string is one pattern, never a list of characters."""
    if not isinstance(exclude, (str, Iterable)):
        raise TypeError(f"exclude must be a pattern or an iterable of patterns, got {type(exclude).__name__}")
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must hold fnmatch patterns (str), got {type(pattern).__name__}: {pattern!r}")
    return patterns


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if any of the fnmatch patterns matches the parameter name (case matters)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_matches(names: Iterable[str], patterns: Iterable[str], *, what: str = "exclude") -> None:
    """Raise ValueError if a pattern matches none of the names: a typo would silently change what is protected."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise ValueError(f"{what} pattern {pattern!r} matches no parameter; the parameters are: {shown or 'none'}")


def is_dtensor(tensor: Tensor) -> bool:
    """True for a torch.distributed DTensor, without importing torch.distributed.tensor."""
    return any(
        cls.__name__ == "DTensor" and cls.__module__.startswith("torch.distributed") for cls in type(tensor).__mro__
    )


def refuse_fsdp1(model: nn.Module, what: str) -> None:
    """FullyShardedDataParallel flattens parameters into shards that no name fits: NotImplementedError."""
    if any(cls.__name__ == "FullyShardedDataParallel" for module in model.modules() for cls in type(module).__mro__):
        raise NotImplementedError(f"{what}: FullyShardedDataParallel is not supported; use DistributedDataParallel")


def refuse_dtensor(named: Mapping[str, Tensor], what: str) -> None:
    """DTensor parameters (FSDP2, tensor parallel) are not supported yet: say so, by name."""
    for name, tensor in named.items():
        if is_dtensor(tensor):
            raise NotImplementedError(
                f"{what}: parameter {name!r} is a DTensor (FSDP2 or tensor parallel); DTensor support is not "
                "implemented yet. Use DistributedDataParallel or an unsharded model."
            )


def op_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that importances and arithmetic of this tensor use: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
