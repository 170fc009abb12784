"""One optimizer step with the penalty of elastic weight consolidation inside: SGD, Adam and AdamW."""

from fastewc.ops.ewc_step.api import Implementation, clip_coefficient, ewc_step, gradient_norm, implementation
from fastewc.ops.ewc_step.halves import halves, whole
from fastewc.ops.ewc_step.rule import StepRule, StepTensors, moment_dtype

__all__ = [
    "Implementation",
    "StepRule",
    "StepTensors",
    "clip_coefficient",
    "ewc_step",
    "gradient_norm",
    "halves",
    "implementation",
    "moment_dtype",
    "whole",
]
