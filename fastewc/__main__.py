"""``python -m fastewc info | check | build | demo``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fastewc import _build, _extension, ops
from fastewc._dispatch import IMPLS, choose, impl_report
from fastewc._version import __version__
from fastewc.testing import assert_all_within_roundings


def info() -> int:
    """Print the versions and what can run here."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    python = platform.python_version()
    print(f"fastewc {__version__}, torch {torch.__version__}, triton {triton}, Python {python}")
    print(f"{platform.platform()}, {torch.get_num_threads()} CPU threads, GPU: {gpu}\n")
    print(impl_report())
    return 0


def _cases() -> Iterator[tuple[str, Any]]:
    """(op, case) of every op folder that has a cases.py."""
    for module in pkgutil.iter_modules(ops.__path__):
        name = f"{ops.__name__}.{module.name}"
        if module.ispkg and importlib.util.find_spec(f"{name}.cases") is not None:
            for case in importlib.import_module(f"{name}.cases").CASES:
                yield module.name, case


def _verdict(op: str, case: Any, impl: str, dtype: torch.dtype, device: str) -> str | None:
    """None where the implementation agrees with the float64 reference, else in words how it does not."""
    inputs: dict[str, Any] = {} if device == "cpu" else {"device": device}
    try:
        assert_all_within_roundings(
            case.run(impl, dtype, **inputs), case.oracle(dtype), roundings=case.roundings,
            error_scale=case.error_scale(dtype), context=f"{op} {case.id} {impl} {dtype} {device}:",
        )  # fmt: skip
    except AssertionError as error:
        return str(error)
    return None


def check() -> int:
    """Compare every implementation on this machine's devices with the float64 reference; 1 where one disagrees."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    results: dict[tuple[str, str, str], list[str | None]] = {}
    absent: dict[tuple[str, str, str], str] = {}
    for op, case in _cases():
        for impl, device in ((impl, device) for impl in IMPLS for device in devices):
            try:
                choose(op, impl, torch.device(device))
            except NotImplementedError as error:
                absent[op, impl, device] = str(error).partition(" tensors: ")[2].partition(". An explicit impl")[0]
                continue
            cell = results.setdefault((op, impl, device), [])
            cell += [_verdict(op, case, impl, dtype, device) for dtype in case.dtypes]
    print(f"{'op':<20}{'impl':<12}{'device':<8}{'result'}")
    for key in sorted({*results, *absent}):
        verdicts = results.get(key, [])
        wrong = [text for text in verdicts if text is not None]
        said = absent.get(key, f"{len(verdicts) - len(wrong)} of {len(verdicts)} agree")
        print(f"{key[0]:<20}{key[1]:<12}{key[2]:<8}{'FAILED: ' if wrong else ''}{said}")
        for text in wrong[:3]:
            print(f"    {text}")
    failed = any(text is not None for verdicts in results.values() for text in verdicts)
    print("FAILED" if failed else "all agree with the reference")
    return 1 if failed else 0


def build() -> int:
    """Compile the native parts and say where they are; 1 where the CPU's fails, or the GPU's where there is one."""
    failed = False
    for device_type in _build.DEVICE_TYPES:
        try:
            print(f"built {_extension.build(device_type)}")
        except (_build.BuildError, OSError) as error:
            print(f"the native {device_type.upper()} kernels could not be built: {error}", file=sys.stderr)
            failed |= device_type == "cpu" or torch.cuda.is_available()
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastewc", description="Elastic weight consolidation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | check | build | demo")
    commands.add_parser("info", help="versions, and which implementations can run here")
    commands.add_parser("check", help="run every implementation here against the reference")
    commands.add_parser("build", help="compile the native parts")
    # Its own options are the demo's, --help too.
    commands.add_parser("demo", help="the main job on data that ships with scikit-learn", add_help=False)
    args, rest = parser.parse_known_args(argv)
    if args.command == "demo":
        from fastewc import demo

        return demo.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return {"info": info, "check": check, "build": build}[args.command]()


if __name__ == "__main__":
    sys.exit(main())
