"""The penalty ½Σc(w − w*)² (E1, E2) as an op: value, gradient, statistics, and E3 and E4 after a step."""

from fastewc.ops.ewc_penalty.api import ewc_hold_back_ as ewc_hold_back_
from fastewc.ops.ewc_penalty.api import ewc_penalty as ewc_penalty
from fastewc.ops.ewc_penalty.api import ewc_penalty_grads as ewc_penalty_grads
from fastewc.ops.ewc_penalty.api import ewc_stats as ewc_stats
