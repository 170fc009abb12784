"""The penalty ½Σc(w − w*)² (E1, E2) as an op: value, gradient, statistics."""

from fastewc.ops.ewc_penalty.api import ewc_held_back as ewc_held_back
from fastewc.ops.ewc_penalty.api import ewc_penalty as ewc_penalty
from fastewc.ops.ewc_penalty.api import ewc_penalty_grad as ewc_penalty_grad
from fastewc.ops.ewc_penalty.api import ewc_stats as ewc_stats
