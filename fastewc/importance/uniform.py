"""Uniform importance: every weight is held equally (L2 to the old weights, equation E9)."""

from __future__ import annotations

import torch

from fastewc._names import Exclude, exclude_parameters, op_dtype, refuse_dtensor, trainable_parameters
from fastewc.importance.base import Importance


def uniform_importance(model: torch.nn.Module, exclude: Exclude = ()) -> Importance:
    """Ω = 1 for every trainable weight (E9): the penalty becomes ½λ‖w − w*‖², L2 to the old weights.

    Args:
        model: any module, wrapped or not.
        exclude: fnmatch pattern(s) of parameter names to leave out.

    Returns:
        Ones of each parameter's shape and device, float32 (float64 for float64 parameters); ``num_samples`` is 1.

    Raises:
        ValueError: nothing is trainable, or a pattern matches nothing.
        NotImplementedError: DTensor parameters.
    """
    parameters = exclude_parameters(trainable_parameters(model), exclude)
    if not parameters:
        raise ValueError("uniform_importance: the model has no trainable parameter that is not excluded")
    refuse_dtensor(parameters, "uniform_importance")
    values = {name: torch.ones_like(p, dtype=op_dtype(p), requires_grad=False) for name, p in parameters.items()}
    return Importance._of(values, 1, "uniform", dict.fromkeys(values, ("given", "one everywhere")))
