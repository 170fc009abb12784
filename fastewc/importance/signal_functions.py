"""Which of PyTorch's functions are layers, activations, norms and so on, for the signal (E8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# function -> its argument names, in order, as far as they matter.
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
LAYERS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _CONV_TRANSPOSE),
    torch.addmm: ("bias", "input", "weight"),
}  # fmt: skip
ADDMM = torch.addmm
SPATIAL = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}


def _functions(*names: str) -> frozenset[Callable[..., Any]]:
    """Every function of one of these names, wherever PyTorch has it."""
    homes = (F, torch, Tensor, torch.special)
    return frozenset(getattr(home, name) for home in homes for name in names if callable(getattr(home, name, None)))


def _also_in_place(*names: str) -> frozenset[Callable[..., Any]]:
    return _functions(*names, *(f"{name}_" for name in names))


ACTIVATIONS = _also_in_place(
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "logsigmoid", "expit",
    "tanh", "softplus", "softsign", "tanhshrink", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink",
    "threshold", "rrelu", "prelu", "clamp", "clamp_min", "clamp_max", "clip", "sin", "cos", "tan", "sinc", "asin",
    "arcsin", "acos", "arccos", "atan", "arctan", "sinh", "cosh", "asinh", "arcsinh", "erf", "erfc", "exp", "exp2",
    "expm1", "log1p", "sqrt", "square", "pow", "__pow__", "abs", "absolute", "__abs__", "sign", "sgn",
)  # fmt: skip
NORMS = _functions("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm")
DROPOUTS = _also_in_place("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
SOFTMAX = _functions("softmax")
# What changes neither the values nor their number: an activation behind it still follows directly.
RESHAPES = _functions(
    "view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis",
    "squeeze", "unsqueeze", "contiguous", "t",
) | {Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]  # fmt: skip
# What may return its argument itself, and has then read nothing.
SAME = DROPOUTS | RESHAPES | _functions("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda")
# What reads no values. Attributes (shape, dtype, device) are recognised by returning no tensor.
METADATA = _functions(
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "is_inference", "is_pinned", "is_tensor", "is_same_size",
    "is_shared", "get_device", "data_ptr", "has_names", "result_type", "__len__", "__hash__",
)  # fmt: skip
