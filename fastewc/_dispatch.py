"""The only chooser of implementations: resolves "auto" to a name, and refuses what can't run with the reason.

The public function of an op matches the name that :func:`choose` returns and imports the implementation inside
the branch, so importing fastewc loads neither Triton nor the native library.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Literal, TypedDict

import torch

from fastewc import _extension

Impl = Literal["auto", "reference", "triton", "native"]
Chosen = Literal["reference", "triton", "native"]

OPS = ("sum_grad_power", "squared_norm_grad", "ewc_step", "ewc_penalty")
IMPLS: tuple[Chosen, ...] = ("reference", "triton", "native")

# (op, implementation) -> the device types it has a kernel for. The reference runs everywhere.
_KERNELS: dict[tuple[str, str], tuple[str, ...]] = {
    ("sum_grad_power", "native"): ("cpu", "cuda"),
    ("sum_grad_power", "triton"): ("cuda",),
    ("squared_norm_grad", "native"): ("cpu", "cuda"),
    ("squared_norm_grad", "triton"): ("cuda",),
    ("ewc_step", "native"): ("cpu", "cuda"),
    ("ewc_step", "triton"): ("cuda",),
    ("ewc_penalty", "native"): ("cpu", "cuda"),
    ("ewc_penalty", "triton"): ("cuda",),
}
_WORDS = {"triton": "Triton", "native": "native (C++)"}
_NO_TRITON = "Triton is not installed: `pip install triton` adds it (Linux)"

_log = logging.getLogger("fastewc")
_told: set[str] = set()


class Availability(TypedDict):
    """One cell of :func:`impl_report`."""

    available: bool
    reason: str


class ImplReport(dict[str, dict[str, Availability]]):
    """op -> implementation -> {"available", "reason"}; its ``str`` is a table."""

    def __str__(self) -> str:
        rows = [("op", "impl", "available", "reason")]
        for op, impls in self.items():
            for impl, cell in impls.items():
                rows.append((op, impl, "yes" if cell["available"] else "no", cell["reason"]))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            f"{op:<{widths[0]}}  {impl:<{widths[1]}}  {available:<{widths[2]}}  {' '.join(reason.split())}"
            for op, impl, available, reason in rows
        )


def choose(op: str, impl: str, device: torch.device) -> Chosen:
    """The implementation that runs ``op`` on tensors of ``device``.

    "auto" takes triton, else native, else reference on CUDA, and native, else reference elsewhere; an explicit
    request never falls back. The first choice of a native kernel may compile the library (seconds, once).

    Args:
        op: one of :data:`OPS`.
        impl: "auto" or one of :data:`IMPLS`.
        device: where the op's tensors are.

    Raises:
        ValueError: unknown op or impl.
        NotImplementedError: an explicit impl that can't run here; the text says why and what would add it.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; wanted one of {', '.join(OPS)}")
    if impl == "auto":
        order: tuple[Chosen, ...] = ("triton", "native") if device.type == "cuda" else ("native",)
        return next((one for one in order if _reason_against(op, one, device.type) is None), "reference")
    for one in IMPLS:
        if one == impl:
            reason = _reason_against(op, one, device.type)
            if reason is not None:
                raise NotImplementedError(
                    f"{op} with impl={impl!r} can't run on {device.type} tensors: {reason}. "
                    'An explicit impl never falls back; impl="auto" takes the best one that runs.'
                )
            return one
    raise ValueError(f"impl must be 'auto', 'reference', 'triton' or 'native', not {impl!r}")


# torch.compile sees a constant: the choice may look at files and run a compiler. This is all that
# torch.compiler.assume_constant_result does, but calling that would import torch._dynamo and with it Triton.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reason_against(op: str, impl: Chosen, device_type: str) -> str | None:
    """Why the implementation can't run, or None; loads, and where need be builds, what it takes."""
    if impl == "reference":
        return None
    devices = _KERNELS.get((op, impl), ())
    if device_type not in devices:
        return _absent(impl, devices)
    if impl == "triton" and not _has_triton():
        return _NO_TRITON
    if impl == "native":
        try:
            _extension.load(device_type)
        except _extension.NativeUnavailable as error:
            reason = str(error)
            if reason not in _told:
                _told.add(reason)
                _log.warning('fastewc: no native %s kernels, impl="auto" goes without: %s', device_type.upper(), reason)
            return reason
    return None


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _absent(impl: Chosen, devices: tuple[str, ...]) -> str:
    if devices:
        return f"not implemented yet: the {_WORDS[impl]} kernel is for {_names(devices)} tensors only"
    return f"not implemented yet: this version of fastewc has no {_WORDS[impl]} kernel of this op"


def _names(devices: tuple[str, ...]) -> str:
    return " and ".join(device.upper() for device in devices)


def impl_report() -> ImplReport:
    """What can run on this machine, and why not: op -> implementation -> {"available": bool, "reason": str}.

    Nothing is loaded or compiled. A native kernel that the first call would compile by itself counts as
    available, with "buildable" in its reason. Printing the report gives a table.
    """
    report = ImplReport()
    for op in OPS:
        report[op] = {impl: _availability(op, impl) for impl in IMPLS}
    return report


def _availability(op: str, impl: Chosen) -> Availability:
    if impl == "reference":
        return {"available": True, "reason": "PyTorch, every device"}
    devices = _KERNELS.get((op, impl), ())
    if not devices:
        return {"available": False, "reason": _absent(impl, devices)}
    if impl == "triton":
        installed = _has_triton()
        reason = f"{_names(devices)} tensors only; {'installed' if installed else _NO_TRITON}"
        return {"available": installed, "reason": reason}
    found = {device: _extension.status(device) for device in devices}
    reason = "; ".join(f"{device.upper()}: {status.reason}" for device, status in found.items())
    return {"available": any(status.state != "missing" for status in found.values()), "reason": reason}
