"""What an importance pass refuses, and what it puts back afterwards."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastewc._names import (
    Exclude,
    as_patterns,
    matches,
    model_parameters,
    refuse_dtensor,
    refuse_fsdp1,
    require_matches,
    trainable_parameters,
)


def wanted_parameters(module: nn.Module, exclude: Exclude, what: str) -> dict[str, nn.Parameter]:
    """The trainable parameters that are not excluded; patterns may match frozen ones too.

    Raises:
        TypeError: module is no torch.nn.Module, or a pattern is no str.
        ValueError: a pattern that matches nothing, no parameter left, one without a shape yet.
        NotImplementedError: DTensor, FullyShardedDataParallel or complex parameters.
    """
    patterns = as_patterns(exclude)
    require_matches(model_parameters(module), patterns)
    refuse_fsdp1(module, what)
    parameters = {name: p for name, p in trainable_parameters(module).items() if not matches(name, patterns)}
    if not parameters:
        raise ValueError(f"{what}: the model has no trainable parameter that is not excluded")
    refuse_dtensor(parameters, what)
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{what}: parameter {name!r} has no shape yet (lazy module); run one forward first")
        if not parameter.is_floating_point():
            raise NotImplementedError(
                f"{what}: parameter {name!r} is {parameter.dtype}; only real floating-point is supported"
            )
    return parameters


def check_model(module: nn.Module, *, allow_dropout: bool, what: str) -> None:
    """Raise ValueError for a model in a mode that mixes samples or draws numbers: batch statistics, active dropout."""
    for name, child in module.named_modules():
        place = f"{type(child).__name__} {name!r}"
        if isinstance(child, _BatchNorm) and (child.training or child.running_mean is None):
            raise ValueError(
                f"{what}: {place} uses the statistics of the batch, so a sample's gradient depends on the other "
                "samples. "
                + (
                    "Call model.eval() first."
                    if child.training
                    else "Give it running statistics (track_running_stats=True)."
                )
            )
        if not allow_dropout and _drops(child):
            raise ValueError(
                f"{what}: dropout is active in {place}. Call model.eval() first, or pass allow_dropout=True."
            )


def _drops(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return bool(module.p > 0)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    return isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1


def _devices(module: nn.Module) -> list[torch.device]:
    tensors = [*module.parameters(), *module.buffers()]
    return sorted({tensor.device for tensor in tensors if tensor.device.type == "cuda"}, key=str)


def refuse_randomness(module: nn.Module, run: Callable[[], None], *, allow: bool, what: str) -> None:
    """Call ``run`` and put the random state back; raise if a forward drew numbers (dropout that no module shows)."""

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(module))]

    with torch.random.fork_rng(devices=_devices(module)):
        before = states()
        run()
        drew = any(not torch.equal(old, new) for old, new in zip(before, states(), strict=True))
    if drew and not allow:
        raise ValueError(
            f"{what}: the forward draws random numbers (active dropout, stochastic depth, sampling). Call "
            "model.eval() first, or pass allow_dropout=True."
        )


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Inside, the module can be run and differentiated; afterwards RNG states and buffers are as they were.

    Compiled modules run eagerly. cuDNN is off where there are recurrent layers on CUDA: in eval mode it has no
    backward.
    """
    devices = _devices(module)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if devices and any(isinstance(child, nn.RNNBase) for child in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # Reentrant checkpointing says so under no_grad, where the first look and SIG run it on purpose.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        stack.enter_context(kept_buffers(module))
        # A cast that autocast cached under no_grad would cut the weight off the graph.
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        yield


@contextlib.contextmanager
def unwritten(module: nn.Module, what: str) -> Iterator[Callable[[], None]]:
    """Inside, no forward may change a parameter; yields a function that looks, and looks once more at the end.

    Raises:
        ValueError: one did, so that a sample's gradient would depend on the samples before it.
    """
    plain = {
        name: p
        for name, p in module.named_parameters()
        if type(p) is nn.Parameter and p.layout == torch.strided and not p.is_meta
    }
    before = {name: _sum_of_bits(p) for name, p in plain.items()}

    def look() -> None:
        changed = [name for name, p in plain.items() if not torch.equal(_sum_of_bits(p), before[name])]
        if changed:
            raise ValueError(
                f"{what}: the forward changes {', '.join(map(repr, changed))} (max_norm of an embedding? a write under "
                "no_grad, or to .data?), so that a sample's gradient depends on the samples before it. Make the change "
                "before the pass (torch.embedding_renorm_ of all rows, for max_norm), or leave it out during the pass"
            )

    yield look
    look()


def _sum_of_bits(parameter: Tensor) -> Tensor:
    """The same for the same content; sums of 8 bytes are an order of magnitude faster than of fewer."""
    flat = parameter.detach().flatten()
    size = flat.element_size()
    aligned = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    words = flat.view(torch.int64 if aligned else {1: torch.int8, 2: torch.int16, 4: torch.int32}[size])
    return words.sum(dtype=torch.int64)


@contextlib.contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Put every buffer back as it was: the same tensor with the same content, or None."""
    buffers = [(owner, name, buffer) for owner in module.modules() for name, buffer in owner._buffers.items()]
    kept = [
        (owner, name, buffer, None if buffer is None else (buffer.detach().clone(), buffer._version))
        for owner, name, buffer in buffers
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, content in kept:
                owner._buffers[name] = buffer
                if buffer is not None and content is not None and not _same(buffer, *content):
                    buffer.copy_(content[0])


def _same(buffer: Tensor, content: Tensor, version: int) -> bool:
    """True if the buffer still holds ``content``, bit for bit (NaN included, and writes through .data)."""
    if type(buffer) is not Tensor or buffer.layout != torch.strided:
        return buffer._version == version
    return torch.equal(buffer.flatten().view(torch.uint8), content.flatten().view(torch.uint8))
