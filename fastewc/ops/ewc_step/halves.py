"""Split master weights: a bfloat16 parameter and the 16 bits it lacks are together exactly a float32 weight.

bits(w) = 2¹⁶ · high + low in integers of 32 bits that wrap around, with high the bits of the bfloat16 nearest to w,
ties away from zero, and low from −2¹⁵ to 2¹⁵ − 1. So the low half is what rounding dropped (a Kahan compensation that
loses nothing), 0 stands for "the parameter is the weight", and both take 4 bytes where a float32 copy beside the
parameter makes it 6. A weight above the largest bfloat16 has an infinite high half and still comes back.

Somebody else may write the high half (``model.load_state_dict``): the low one that stays moves the new weight by at
most half an ulp of bfloat16. Pairs that no weight has (zero and a negative low half, infinity and a positive one) would
be NaN; they count as their high half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def whole(high: Tensor, low: Tensor) -> Tensor:
    """The float32 weight of a bfloat16 parameter and its int16 remainder, of one shape."""
    bits = high.detach().view(torch.int16).to(torch.int32) * 65536 + low
    w = bits.view(torch.float32)
    return torch.where(w.isnan(), high.detach().float(), w)


def halves(w: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16, int16) of a float32 weight; NaN, whose bits rounding could carry into −0, is (NaN, 0)."""
    rounded = w.view(torch.int32) + 0x8000
    high = (rounded >> 16).to(torch.int16).view(torch.bfloat16)
    low = ((rounded & 0xFFFF) - 0x8000).to(torch.int16)
    nan = w.isnan()
    return high.masked_fill(nan, math.nan), low.masked_fill(nan, 0)
