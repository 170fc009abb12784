"""The seed of a MAS backward pass: the gradient of the squared norm of a model's output."""

from fastewc.ops.squared_norm_grad.api import squared_norm_grad

__all__ = ["squared_norm_grad"]
