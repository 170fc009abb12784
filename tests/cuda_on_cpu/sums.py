"""What the cases of sum_grad_power don't reach of its CUDA sources; run by tests/ops/test_cuda_on_cpu.py.

There is one multiprocessor: two blocks share the samples where the weight is one tile.
"""

import pytest
import torch

from fastewc.ops.sum_grad_power import native
from fastewc.ops.sum_grad_power.cases import Case, ConvCase, SegmentsCase
from fastewc.testing import assert_all_within_roundings

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [
    Case(101, None, 65, 3, 1),  # T = 1 in two splits, the last with an incomplete tile of positions
    Case(3, 5, 7, 66, 2),  # two splits of unequal length
    Case(2, 40, 70, 130, 2),  # several tiles each way, several tiles of positions
    SegmentsCase(2, (1,) * 61, 3, 4),  # more uses than one launch brings to the device
    ConvCase(3, 3, 3, (5,), (2,), groups=3),  # few elements: warps share the samples
    ConvCase(2, 6, 42, (4, 5), (3, 3), padding=1, groups=3),  # 14 outputs to a group, in tiles
    ConvCase(5, 4, 8, (4, 5), (2, 2), stride=2, groups=4, layout="channels_last", total="transposed", segments=2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cases(case) -> None:
    for dtype in DTYPES:
        made = case.make_inputs(dtype)
        if isinstance(case, Case):
            segments = [tuple(t if t.ndim == 3 else t[:, None] for t in made)]
            total = torch.zeros(case.O, case.I, dtype=torch.promote_types(dtype, torch.float32))
            native.add_sum_grad_power(total, segments, case.p)
        elif isinstance(case, SegmentsCase):
            total = made[0]
            native.add_sum_grad_power(*made, case.p)
        else:
            total = made[0]
            native.add_conv_grad_power(*made, case.p, **case.settings)
        scale = case.error_scale(dtype)
        assert_all_within_roundings([total], case.oracle(dtype), roundings=case.roundings, error_scale=scale)


def test_the_kernel_repeats_the_checks() -> None:
    total, a, g = torch.zeros(4, 3), torch.ones(2, 5, 3), torch.ones(2, 5, 4)
    op, conv = torch.ops.fastewc.add_sum_grad_power, torch.ops.fastewc.add_conv_grad_power
    for arguments, text in (
        ((total, [a], [g], 3), "wanted p of 1 or 2, given 3"),
        ((total, [a], [], 2), "as many g as inputs, given 0 for 1"),
        ((total, [a], [g.double()], 2), "one dtype, Float, given Double"),
        ((total.double(), [a], [g], 2), "wanted a Float total, given Double"),
        ((total, [a, a[:1]], [g, g[:1]], 2), r"wanted a \[N, T, I\].*given \[1, 5, 3\]"),
    ):
        with pytest.raises(RuntimeError, match=text):
            op(*arguments)
    total, x, g = torch.zeros(4, 3, 2), torch.ones(2, 3, 6), torch.ones(2, 4, 5)
    conv(total, [x], [g], 2, [1], [0], [1], 1)
    assert (total == 50).all()
    for arguments, text in (
        ((total, [x], [g], 2, [1, 1], [0], [1], 1), "as many numbers in stride"),
        ((total, [x], [g], 2, [0], [0], [1], 1), "stride and dilation of at least 1"),
        ((total, [x], [g], 2, [1], [0], [2], 1), r"of this convolution.*given \[2, 3, 6\] and \[2, 4, 5\]"),
        ((total, [x], [g], 2, [1], [0], [1], 3), "for 3 groups"),
    ):
        with pytest.raises(RuntimeError, match=text):
            conv(*arguments)
    assert (total == 50).all()
