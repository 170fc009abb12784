"""Uniform importance: every weight is held equally (L2 to the old weights, equation E9)."""

from __future__ import annotations

import torch

from fastewc._names import Exclude, op_dtype
from fastewc.importance.base import Importance
from fastewc.importance.guards import wanted_parameters


def uniform_importance(model: torch.nn.Module, exclude: Exclude = ()) -> Importance:
    """Ω = 1 for every trainable weight (E9): the penalty becomes ½λ‖w − w*‖², L2 to the old weights.

    Args:
        model: any module, wrapped or not.
        exclude: fnmatch pattern(s) of parameter names to leave out.

    Returns:
        Ones of each parameter's shape and device, float32 (float64 for float64 parameters); ``num_samples`` is 1.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: nothing is trainable, a pattern matches nothing, or a lazy parameter has no shape yet.
        NotImplementedError: DTensor, FSDP1 or complex parameters.
    """
    parameters = wanted_parameters(model, exclude, "uniform_importance")
    values = {name: torch.ones_like(p, dtype=op_dtype(p), requires_grad=False) for name, p in parameters.items()}
    return Importance._of(values, 1, "uniform", dict.fromkeys(values, ("given", "one everywhere")))
