"""One optimizer step with the penalty of elastic weight consolidation inside: SGD, Adam and AdamW."""

from fastewc.ops.ewc_step.api import StepRule, StepTensors, clip_coefficient, ewc_step, gradient_norm

__all__ = ["StepRule", "StepTensors", "clip_coefficient", "ewc_step", "gradient_norm"]
