// The micro-kernel: a tile of Σ_n |Σ_t x g|^p, held in registers while it walks over samples and positions.
//
// A tile is ROWS numbers of x (inputs) times two vectors of g (outputs), or the other way round: which side has the
// lanes is the caller's choice. Per position it loads two vectors from a packed panel, and ROWS numbers from wherever
// the tables say (so a convolution reads its windows in place), for 2·ROWS multiply-adds. Both the sample's sum and the
// total stay in registers where there are 32 of them.
#pragma once

#include "../common.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastewc {

constexpr int64_t ROWS = 6;

// One use of the weight by consecutive samples, as the micro-kernel walks it: number r of sample n at position t is
// x[n·sample + position[t] + row[r]].
template <typename M>
struct Walk {
  const M* x;
  int64_t sample;
  int64_t positions;
  const int64_t* position;
  const int64_t* row;
};

enum class Power : int64_t { identity = 0, absolute = 1, square = 2 };

// What a tile is made of. Its ROWS × lanes totals are dense at `total`.
template <typename M>
struct TileJob {
  const M* panel; // [samples, positions of all uses, lanes]
  const Walk<M>* uses;
  int64_t use_count;
  int64_t samples;
  Power power;
  M* total;
};

template <typename M>
using TileFunction = void (*)(const TileJob<M>&);

// Vectors of GCC and Clang. They may alias what they are loaded from; the buffers are aligned to 64 bytes.
template <typename M, int BYTES>
struct simd {
  typedef M vector __attribute__((vector_size(BYTES), may_alias));
  using Bits = std::conditional_t<sizeof(M) == 8, uint64_t, uint32_t>;
  typedef Bits bits __attribute__((vector_size(BYTES), may_alias));
  static constexpr int64_t WIDTH = BYTES / sizeof(M);
};

// LANES_OF_X: x has a number of its own for each lane (grouped convolutions), else one for all.
template <typename M, int BYTES, bool LANES_OF_X>
FASTEWC_INLINE void tile(const TileJob<M>& given) {
  using S = simd<M, BYTES>;
  using V = typename S::vector;
  constexpr int64_t W = S::WIDTH;
  const volatile TileJob<M>& job = given; // read anew each time: kept, its fields would push vectors to the stack
  V total[ROWS][2];
  const M* panel = job.panel;
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    total[r][0] = *reinterpret_cast<const V*>(job.total + (2 * r) * W);
    total[r][1] = *reinterpret_cast<const V*>(job.total + (2 * r + 1) * W);
  }
  for (int64_t n = 0; n < job.samples; ++n) {
    V sum[ROWS][2] = {};
    for (const Walk<M>* use = job.uses; use != job.uses + job.use_count; ++use) {
      const M* x = use->x + n * use->sample;
      const int64_t* position = use->position;
      const int64_t row[ROWS] = {use->row[0], use->row[1], use->row[2], use->row[3], use->row[4], use->row[5]};
      for (const int64_t* end = position + use->positions; position != end; ++position, panel += 2 * W) {
        const M* at = x + *position;
        asm("" : "+r"(at)); // one sum per position; the compiler would add up each of the ROWS addresses anew
        const V g0 = *reinterpret_cast<const V*>(panel);
        const V g1 = *reinterpret_cast<const V*>(panel + W);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
          if constexpr (LANES_OF_X) {
            sum[r][0] += *reinterpret_cast<const V*>(at + row[r]) * g0;
            sum[r][1] += *reinterpret_cast<const V*>(at + row[r] + W) * g1;
          } else {
            const M number = at[row[r]];
            sum[r][0] += number * g0;
            sum[r][1] += number * g1;
          }
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        if (job.power == Power::square) {
          total[r][v] += sum[r][v] * sum[r][v];
        } else if (job.power == Power::absolute) {
          // The sign is shifted out: a mask would take a register from the loop above.
          const auto bits = reinterpret_cast<const typename S::bits&>(sum[r][v]) << 1 >> 1;
          total[r][v] += reinterpret_cast<const V&>(bits);
        } else {
          total[r][v] += sum[r][v];
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    *reinterpret_cast<V*>(job.total + (2 * r) * W) = total[r][0];
    *reinterpret_cast<V*>(job.total + (2 * r + 1) * W) = total[r][1];
  }
}

// Instructions that the inner loops may use, each level with those before it.
enum class Isa { baseline, avx2, avx512, amx };

#if defined(__x86_64__) && !defined(FASTEWC_NO_CPU_CLONES)
#if defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define FASTEWC_AMX 1
inline bool amx_is_there() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: the system has to agree
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("amx-bf16") &&
      syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#else
inline bool amx_is_there() {
  return false;
}
#endif

inline Isa isa_of_this_machine() {
  return !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ? Isa::baseline
      : !__builtin_cpu_supports("avx512f")                                 ? Isa::avx2
      : !amx_is_there()                                                    ? Isa::avx512
                                                                           : Isa::amx;
}
#else
inline Isa isa_of_this_machine() {
  return Isa::baseline;
}
#endif

// The machine's best, or FASTEWC_MAX_CPU_ISA if that is less.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* most = std::getenv("FASTEWC_MAX_CPU_ISA");
    const std::string_view named = most == nullptr ? "amx" : most;
    constexpr std::string_view names[] = {"baseline", "avx2", "avx512", "amx"};
    for (int level = 0; level < 4; ++level) {
      if (named == names[level]) {
        return std::min(isa_of_this_machine(), static_cast<Isa>(level));
      }
    }
    STD_TORCH_CHECK(false, "FASTEWC_MAX_CPU_ISA: wanted baseline, avx2, avx512 or amx, given ", most);
  }();
  return chosen;
}

// The micro-kernel for this machine, and how many lanes its tiles have.
template <typename M>
struct Machine {
  int64_t lanes;
  TileFunction<M> tile, tile_of_lanes;
};

template <typename M, bool LANES_OF_X>
void tile_baseline(const TileJob<M>& job) {
  tile<M, 16, LANES_OF_X>(job);
}

// Chosen once, by what the processor says it has. (No clones as in common.h: each has a vector type of its own.)
#if defined(__x86_64__) && !defined(FASTEWC_NO_CPU_CLONES)
template <bool LANES_OF_X>
__attribute__((target("avx2,fma"))) void tile_avx2(const TileJob<float>& job) {
  tile<float, 32, LANES_OF_X>(job);
}
template <bool LANES_OF_X>
__attribute__((target("avx512f"))) void tile_avx512(const TileJob<float>& job) {
  tile<float, 64, LANES_OF_X>(job);
}
#endif

template <typename M>
Machine<M> machine_of_this_process() {
#if defined(__x86_64__) && !defined(FASTEWC_NO_CPU_CLONES)
  if constexpr (std::is_same_v<M, float>) {
    if (isa() >= Isa::avx512) {
      return {32, tile_avx512<false>, tile_avx512<true>};
    }
    if (isa() == Isa::avx2) {
      return {16, tile_avx2<false>, tile_avx2<true>};
    }
  }
#endif
  return {2 * simd<M, 16>::WIDTH, tile_baseline<M, false>, tile_baseline<M, true>};
}

template <typename M>
const Machine<M>& this_machine() {
  static const Machine<M> machine = machine_of_this_process<M>();
  return machine;
}

} // namespace fastewc
