// What ewc_stats_terms returns, as fastewc/ops/ewc_penalty/schema.py has it: a few sums, then a histogram of αλΩ.
#pragma once

namespace fastewc {

enum Term { VALUE, SQUARES, ABOVE_ONE, LARGEST, TERMS };

// Bin 0 counts αλΩ = 0, the others log2 αλΩ in steps of 1/40.
constexpr int BINS_PER_OCTAVE = 40, LOW = -149, HIGH = 128;
constexpr int BINS = 1 + (HIGH - LOW) * BINS_PER_OCTAVE;

} // namespace fastewc
