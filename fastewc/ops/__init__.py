"""The kernels: stateless functions on tensors, a folder each."""

from fastewc.ops.ewc_penalty import ewc_penalty as ewc_penalty
from fastewc.ops.ewc_step import ewc_step as ewc_step
from fastewc.ops.squared_norm_grad import squared_norm_grad as squared_norm_grad
from fastewc.ops.sum_grad_power import sum_grad_power as sum_grad_power
