"""Importances of every layer in torch's own module tests: ``python -m tests.per_sample.module_sweep``.

torch.testing._internal lists how each torch.nn module is built and called. Each such input is made a batch of three
independent samples of its shapes (an input without a batch dimension is one sample), and Fisher and MAS of the module
are compared elementwise with float64 autograd on one sample after the other. Prints a table; exits with 1 if a number
is wrong.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastewc import fisher_importance, mas_importance
from tests.per_sample.checking import assert_importance, naive, paths, scales_of, with_statistics

N = 3
_CODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Outcome:
    """Of one input: kind "exact", "refused", "skipped" or "wrong"; ``paths`` counts the parameter tensors of each."""

    module: str
    desc: str
    kind: str
    why: str = ""
    paths: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.module} {self.desc!r}: {self.why}"


class OneNumber(Exception):
    """The output has no dimension of samples."""


@cache
def database() -> dict[str, Any]:
    """torch's entries by name.

    Raises:
        ImportError: torch.testing._internal misses something that it imports.
    """
    from torch.testing._internal.common_modules import module_db

    return {info.name: info for info in module_db}


def inputs_of(name: str) -> list[Any]:
    """The ways to build and call a module, in float64 and eval mode, of those that have parameters."""
    info = database()[name]
    given = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=False)
    return [one for one in given if list(_built(name, one).parameters())]


def _built(name: str, given: Any) -> nn.Module:
    args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True, but")  # a default of encoders that few suit
        module: nn.Module = database()[name].module_cls(*args, **kwargs)
    return module.double().eval()


def _batch_first(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder):
        module = module.layers[0]
    return bool((module.self_attn if isinstance(module, _CODERS) else module).batch_first)


def _dimensions_of_a_sample(module: nn.Module) -> int | None:
    """Of the first input, where the module also takes a single sample; None: it always takes a batch."""
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.RNNCellBase, nn.LinearCrossEntropyLoss)):
        return 1
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention, nn.Transformer, *_CODERS)):
        return 2
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1 + len(module.kernel_size)
    return None


def _place(module: nn.Module, name: str, tensor: Tensor) -> int | str | None:
    """The dimension of samples in an argument; "heads": with the heads in dimension 0; None: the same for all."""
    if name.endswith("mask"):
        return 0 if "padding" in name else "heads" if tensor.ndim == 3 else None
    if isinstance(module, nn.RNNBase):
        return 0 if name == "0" and module.batch_first else 1
    if isinstance(module, (nn.MultiheadAttention, nn.Transformer, *_CODERS)):
        return 0 if _batch_first(module) else 1
    return 0


class Samples:
    """Independent samples of the shapes of an input, and the module's call on any number of them."""

    def __init__(self, module: nn.Module, given: Any) -> None:
        leaves, self._spec = pytree.tree_flatten_with_path((given.args, given.kwargs))
        first = next(leaf for _, leaf in leaves if isinstance(leaf, Tensor))
        if not first.ndim:
            raise OneNumber("the input is one number")
        single = first.ndim == _dimensions_of_a_sample(module)
        self._leaves, self._places = [leaf for _, leaf in leaves], dict[int, int | str]()
        self.tensors: list[Tensor] = []
        for i, (path, leaf) in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            name = path[1].key if isinstance(path[1], pytree.MappingKey) else str(path[1].idx)
            place = _place(module, name, leaf)
            if place is not None:
                self._places[i] = place
                self.tensors.append(_drawn(leaf, None if single else place))
        more, fewer = (pytree.tree_leaves(self._result(module, [t[:n] for t in self.tensors])) for n in (N, N - 1))
        self._dims = [_grown(a.shape, b.shape) for a, b in zip(more, fewer, strict=True) if isinstance(a, Tensor)]

    def _result(self, module: nn.Module, tensors: Any) -> Any:
        leaves = list(self._leaves)
        for (i, place), tensor in zip(self._places.items(), tensors, strict=True):
            leaves[i] = tensor.flatten(0, 1) if place == "heads" else tensor.movedim(0, place)
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return module(*args, **kwargs)

    def output(self, module: nn.Module, tensors: Any) -> Tensor:
        """[n, D]: everything that the module returns for each of the n samples."""
        n = len(tensors[0])
        found = [leaf for leaf in pytree.tree_leaves(self._result(module, tensors)) if isinstance(leaf, Tensor)]
        return torch.cat([t.movedim(dim, 0).reshape(n, -1) for t, dim in zip(found, self._dims, strict=True)], 1)


def _grown(more: torch.Size, fewer: torch.Size) -> int:
    grown = [i for i, (a, b) in enumerate(zip(more, fewer, strict=True)) if a != b]
    if len(grown) != 1:
        raise OneNumber("one number for the whole batch")
    return grown[0]


def _drawn(like: Tensor, dim: Any) -> Tensor:
    """[N, ...]: normal numbers; whole numbers from among those given; the same mask for every sample.

    ``dim``: the dimension of samples in ``like``; None if it is one sample.
    """
    shape = list(like.shape)
    if dim is not None:
        del shape[dim]
    if like.is_floating_point():
        return torch.randn(N, *shape, dtype=like.dtype)
    if like.dtype == torch.bool:
        return (like if dim is None else like.select(dim, 0)).expand(N, *shape).clone()
    return like.flatten()[torch.randint(like.numel(), (N, *shape))]


def outcome(name: str, given: Any) -> Outcome:
    """What comes of one input."""
    module = with_statistics(_built(name, given))
    try:
        samples = Samples(module, given.forward_input)
    except OneNumber as reason:
        return Outcome(name, given.desc, "skipped", str(reason))
    for p in module.parameters():
        nn.init.normal_(p)
    y = torch.randn_like(samples.output(module, samples.tensors).detach())
    batch = (*samples.tensors, y)

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return samples.output(model, batch[:-1]), batch[-1]

    def each(i: int) -> tuple[Tensor, Tensor]:
        out, target = forward(module, tuple(t[i : i + 1] for t in batch))
        return out, out - target

    try:
        got = fisher_importance(module, [batch], loss="gaussian", forward=forward)
        other = mas_importance(module, [batch], forward=forward)
    except (ValueError, NotImplementedError) as reason:
        return Outcome(name, given.desc, "refused", str(reason))
    fisher = naive(module, lambda i: [(1.0, 0.5 * each(i)[1].square().sum())], N)
    mas = naive(module, lambda i: [(1.0, each(i)[0].square().sum())], N, power=1)
    try:
        assert_importance(got, fisher, scales=scales_of(fisher, 2))
        assert_importance(other, mas, scales=scales_of(mas, 1))
    except AssertionError as reason:
        return Outcome(name, given.desc, "wrong", str(reason))
    return Outcome(name, given.desc, "exact", "", tuple((path, len(names)) for path, names in paths(got).items()))


def outcomes(name: str) -> Iterator[Outcome]:
    """Of every input of a module."""
    for given in inputs_of(name):
        yield outcome(name, given)


def names() -> list[str]:
    """Of the modules that have parameters in any of their inputs."""
    return [name for name in database() if inputs_of(name)]


def main() -> int:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # torch's, about its own inputs
    kinds, steps = ("exact", "refused", "skipped", "wrong"), ("fused", "op", "batch-1", "unused")
    print(f"| torch {torch.__version__} | {' | '.join((*kinds, *steps))} |")
    print("| --- " * (len(kinds) + len(steps) + 1) + "|")
    remarks, total = Counter[str](), Counter[str]()
    for name in names():
        found = list(outcomes(name))
        counts = Counter(one.kind for one in found)
        for one in found:
            counts.update(dict(one.paths))
            if one.kind != "exact":
                remarks[str(one)] += 1
        total += counts
        print(f"| {name} | {' | '.join(str(counts[key] or '–') for key in (*kinds, *steps))} |", flush=True)
    print(f"| all | {' | '.join(str(total[key]) for key in (*kinds, *steps))} |")
    print(*(f"{count} × {remark}" for remark, count in remarks.items()), sep="\n")
    return int(total["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
