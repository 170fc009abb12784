"""All benchmarks of single ops: first every contender must be right, then it is timed.

python -m benchmarks.ops [--out FILE] [--seconds 1] [--shapes mlp resnet18 gpt2] [--device cpu] [--threads N]
"""

from benchmarks.ops import ewc_step, squared_norm_grad, sum_grad_power
from benchmarks.ops.command_line import run

if __name__ == "__main__":
    run(__doc__, "ops", squared_norm_grad.rows, sum_grad_power.rows, ewc_step.rows)
