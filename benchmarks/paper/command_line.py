"""What the programs of this package have in common: data, protocol, seeds, threads, where the JSON goes."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.paper.mnist_tasks import Split, load_mnist
from benchmarks.paper.protocol import Protocol
from benchmarks.paper.results_file import Results
from benchmarks.results_row import ROOT, machine

S = TypeVar("S", bound=Any)  # a frozen dataclass with defaults


def begin(
    program: str,
    description: str | None,
    argv: Sequence[str] | None,
    *,
    published: Protocol,
    seeds: int,
    least_seeds: int = 1,
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> tuple[argparse.Namespace, Protocol, Split]:
    """Read the command line, set the threads, load MNIST.

    Args:
        program: the module's name in this package.
        description: for --help.
        argv: the arguments; None: those of the process.
        published: the protocol's numbers; with others a trial has to say where its results go.
        seeds: how many runs by default.
        least_seeds: fewer are refused: 2 where there must be an interval.
        more: adds the program's own arguments.

    Returns:
        The arguments (``seeds``, and ``out``, filled), the protocol to follow, and MNIST.
    """
    parser = _parser(program, description)
    parser.add_argument("--data-root", default=os.environ.get("FASTEWC_DATA"), help="folder with MNIST/raw")
    parser.add_argument("--download", action="store_true", help="fetch MNIST if it is not there")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"runs (default {seeds})")
    if published.tasks > 1:
        parser.add_argument("--tasks", type=int, default=published.tasks, help="fewer for a trial")
    parser.add_argument("--epochs", type=int, default=published.epochs, help="fewer for a trial")
    more(parser)
    args = parser.parse_args(argv)
    if args.seeds < least_seeds:
        parser.error(f"--seeds must be at least {least_seeds}, got {args.seeds}")
    protocol = dataclasses.replace(published, tasks=getattr(args, "tasks", 1), epochs=args.epochs)
    if protocol != published and args.out is None:
        parser.error("not the published protocol: give --out FILE")
    _settle(args, program)
    return args, protocol, load_mnist(args.data_root, download=args.download)


def begin_setup(
    program: str, description: str | None, argv: Sequence[str] | None, setup_type: type[S],
    more: Callable[[argparse.ArgumentParser], object],
) -> tuple[argparse.Namespace, S, Results]:  # fmt: skip
    """The same for a program whose numbers are the fields of a dataclass, each an argument.

    Returns:
        The arguments, the numbers, and the results that there are of them.
    """
    parser = _parser(program, description)
    more(parser)
    for field in dataclasses.fields(setup_type):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args(argv)
    setup = setup_type(**{field.name: getattr(args, field.name) for field in dataclasses.fields(setup_type)})
    if setup != setup_type() and args.out is None:
        parser.error("not the default setup: give --out FILE")
    _settle(args, program)
    return args, setup, Results(args.out, setup)


def _parser(program: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.paper.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/<machine>/paper_{program}.json")
    return parser


def _settle(args: argparse.Namespace, program: str) -> None:
    """Set the threads first: the folder of the results is named by them."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.out = args.out or ROOT / "benchmarks" / "results" / machine() / f"paper_{program}.json"
