// A weight in two halves: fastewc/ops/ewc_step/halves.py is the specification.
#pragma once

#include "importance_codes.h"

#include <cstdint>

namespace fastewc {

// The weight of a bfloat16, given as its bits, and its remainder. A NaN made by both is the high half alone.
FASTEWC_HD float whole(uint16_t high, int16_t low) {
  const uint32_t top = static_cast<uint32_t>(high) << 16;
  const float w = float_of(top + static_cast<uint32_t>(static_cast<int32_t>(low)));
  return w == w ? w : float_of(top);
}

// The bits of a weight; of NaN those whose halves are NaN and 0.
FASTEWC_HD uint32_t bits_to_split(float w) {
  return w == w ? bits_of(w) : 0x7fc00000u;
}

// The bits of the nearest bfloat16, ties away from zero.
FASTEWC_HD uint16_t high_half(uint32_t bits) {
  return static_cast<uint16_t>((bits + 0x8000u) >> 16);
}

// What it lacks: the lower 16 bits, as a signed number.
FASTEWC_HD int16_t low_half(uint32_t bits) {
  return static_cast<int16_t>(bits);
}

} // namespace fastewc
