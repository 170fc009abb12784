// The same sums on a matrix unit: Intel's AMX multiplies bfloat16 16 times as fast as vectors multiply float32.
//
// A float32 is the sum of three bfloat16, x = x0 + x1 + x2 of 8 bits each, the products of their parts are exact in
// float32, and of the nine all but x1 y2, x2 y1 and x2 y2 are formed: what is left out is at most 2^-24 |x y|, one
// rounding of float32. So six products give a float32 result in 6/16 of the time. Numbers below 2^-100 lose their last
// digits, because the unit takes subnormal parts for zero; infinities come out as NaN.
//
// Channels go in panels of 2 · 16. A sample's positions are its steps: 32 positions, of which every part has a tile of
// its own; what remains of them is written out product by product, so that 4 positions make one step and not six.
#pragma once

#include "problem_cpu.h"

#ifdef FASTEWC_AMX
#include <immintrin.h>

#define FASTEWC_AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")))

namespace fastewc::amx {

constexpr int64_t SIDE = 16; // channels of a tile
constexpr int64_t PANEL = 2 * SIDE;
constexpr int64_t STEP = 32; // positions of a tile
constexpr int64_t TILE = SIDE * STEP; // numbers of a tile, 1 KB
constexpr int64_t RUN = 512; // positions that are multiplied at a time
constexpr int64_t RUN_BYTES = 1 << 19; // of one side's parts that stay in the second-level cache meanwhile

// The parts of the products, smallest first; A's and B's in turn change as rarely as they can.
constexpr int PRODUCTS = 6;
constexpr int PART_OF_A[PRODUCTS] = {2, 1, 1, 0, 0, 0};
constexpr int PART_OF_B[PRODUCTS] = {0, 0, 1, 1, 2, 0};

// The positions of a sample, or the samples of a run where T = 1.
struct Steps {
  int64_t positions, full, rest, tails; // full: steps of STEP positions; rest: pairs of positions after them

  Steps(int64_t positions, int parts)
      : positions(positions),
        full(positions / STEP),
        rest((positions % STEP + 1) / 2),
        tails((rest * (parts == 1 ? 1 : PRODUCTS) + STEP / 2 - 1) / (STEP / 2)) {}

  int64_t numbers(int parts) const { // of a panel
    return 2 * TILE * (full * parts + tails);
  }
};

using Pairs = __m512i; // one part of 16 channels at two positions

// The bfloat16 nearest to each number, as a float.
FASTEWC_AMX_TARGET inline __m512 nearest(__m512 x) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

FASTEWC_AMX_TARGET inline Pairs paired(__m512 even, __m512 odd) {
  return _mm512_mask_blend_epi16(
      0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
}

// The parts of 16 channels at two positions.
template <int PARTS>
FASTEWC_AMX_TARGET inline void split(__m512 x, __m512 y, Pairs (&parts)[PARTS]) {
#pragma GCC unroll 3
  for (int part = 0; part < PARTS; ++part) {
    const __m512 x_part = nearest(x), y_part = nearest(y);
    parts[part] = paired(x_part, y_part);
    x = _mm512_sub_ps(x, x_part);
    y = _mm512_sub_ps(y, y_part);
  }
}

FASTEWC_AMX_TARGET inline __m512 raised(__m512 x, Power power) {
  return power == Power::square ? _mm512_mul_ps(x, x)
      : power == Power::absolute ? _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)))
                                 : x;
}

// 16 by 16, turned.
FASTEWC_AMX_TARGET inline void turn(const Pairs* from, Pairs* to) {
  __m512i x[16], y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    to[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    to[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    to[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    to[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// One use of the weight, from one side.
struct Source {
  const void* data;
  ScalarType dtype;
  int64_t sample, channel; // steps in memory
  std::vector<int64_t> position;
};

// One side of the products: what a channel is to the total, and where its numbers come from.
struct Channels {
  int64_t count, total; // total: step in it
  std::vector<Source> sources;
  int64_t ahead = 0; // to the numbers of a step later, for the cache

  int64_t panels() const {
    return (count + PANEL - 1) / PANEL;
  }
};

// Positions of all uses by one sample, as tiles for the unit: rows of channels (A), where it wants each channel's
// positions side by side, or columns (B), where it wants pairs of them.
template <int PARTS>
class Packer {
 public:
  Packer(const Channels& side, bool rows, Power power) : side_(side), rows_(rows), power_(power) {}

  // Positions [first, first + steps.positions) of panels [begin, end), each of them panel_step after the one before.
  FASTEWC_AMX_TARGET void pack(
      int64_t begin, int64_t end, int64_t n, int64_t first, const Steps& steps, BFloat16* to, int64_t panel_step) const {
    alignas(64) float numbers[STEP * PANEL];
    alignas(64) Pairs pairs[2][PARTS][STEP / 2];
    const float* at[STEP];
    for (int64_t t = 0; t < steps.positions; t += STEP, to += 2 * PARTS * TILE) {
      const int64_t count = std::min(STEP, steps.positions - t);
      for (int64_t panel = begin; panel < end; ++panel) {
        const __mmask32 channels = find(panel, n, first + t, count, at, numbers);
        for (int half = 0; half < 2; ++half) {
          const __mmask16 mask = static_cast<__mmask16>(channels >> (SIDE * half));
          const auto load = [&](int64_t t) FASTEWC_AMX_TARGET __attribute__((always_inline)) {
            if (t >= count) {
              return _mm512_setzero_ps();
            }
            _mm_prefetch(at[t] + SIDE * half + side_.ahead, _MM_HINT_T1);
            return raised(_mm512_maskz_loadu_ps(mask, at[t] + SIDE * half), power_);
          };
          for (int64_t t2 = 0; t2 < (count + 1) / 2; ++t2) {
            Pairs parts[PARTS];
            split<PARTS>(load(2 * t2), load(2 * t2 + 1), parts);
#pragma GCC unroll 3
            for (int part = 0; part < PARTS; ++part) {
              pairs[half][part][t2] = parts[part];
            }
          }
        }
        BFloat16* tiles = to + (panel - begin) * panel_step;
        if (count == STEP) {
          for (int part = 0; part < PARTS; ++part) {
            put(pairs[0][part], tiles + 2 * part * TILE);
            put(pairs[1][part], tiles + (2 * part + 1) * TILE);
          }
        } else {
          write_out(pairs, steps, tiles);
        }
      }
    }
  }

 private:
  // Where the numbers of a panel are at positions [t, t + count), and which of its channels there are. Numbers that are
  // no float32 or lie apart are brought to `numbers` before.
  FASTEWC_AMX_TARGET __mmask32
  find(int64_t panel, int64_t n, int64_t t, int64_t count, const float** at, float* numbers) const {
    const int64_t channel = panel * PANEL, channels = std::min(PANEL, side_.count - channel);
    for (const Source& source : side_.sources) {
      const int64_t own = static_cast<int64_t>(source.position.size()), here = std::min(count, own - t);
      if (here <= 0) {
        t -= own;
        continue;
      }
      const int64_t* position = source.position.data() + t;
      with_elements<float>(source.data, source.dtype, [&](const auto* data) {
        const auto* from = data + n * source.sample + channel * source.channel;
        if constexpr (std::is_same_v<decltype(data), const float*>) {
          if (source.channel == 1) {
            for (int64_t i = 0; i < here; ++i) {
              at[i] = from + position[i];
            }
            return;
          }
        }
        pack_panel(from, source.channel, position, here, channels, PANEL, Power::identity, numbers);
        for (int64_t i = 0; i < here; ++i) {
          at[i] = numbers + i * PANEL;
        }
      });
      at += here;
      numbers += here * PANEL;
      count -= here;
      t = 0;
    }
    return channels == PANEL ? 0xffffffff : (1u << channels) - 1;
  }

  FASTEWC_AMX_TARGET void put(const Pairs* pairs, BFloat16* to) const {
    Pairs* tile = reinterpret_cast<Pairs*>(to);
    if (rows_) {
      turn(pairs, tile);
    } else {
      std::copy(pairs, pairs + STEP / 2, tile);
    }
  }

  // The rest of the positions, as often as there are products.
  FASTEWC_AMX_TARGET void write_out(const Pairs (&pairs)[2][PARTS][STEP / 2], const Steps& steps, BFloat16* to) const {
    constexpr int COUNT = PARTS == 1 ? 1 : PRODUCTS;
    alignas(64) Pairs all[COUNT * STEP / 2];
    for (int half = 0; half < 2; ++half) {
      for (int product = 0; product < COUNT; ++product) {
        const int part = PARTS == 1 ? 0 : rows_ ? PART_OF_A[product] : PART_OF_B[product];
        std::copy(pairs[half][part], pairs[half][part] + steps.rest, all + product * steps.rest);
      }
      std::fill(all + COUNT * steps.rest, all + steps.tails * STEP / 2, _mm512_setzero_si512());
      for (int64_t tail = 0; tail < steps.tails; ++tail) {
        put(all + tail * STEP / 2, to + (2 * tail + half) * TILE);
      }
    }
  }

  const Channels& side_;
  const bool rows_;
  const Power power_;
};

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// While it lives, this thread can use the unit.
class Unit {
 public:
  FASTEWC_AMX_TARGET Unit() {
    static const Configuration configuration; // static: to GCC, the instruction reads the first bytes only
    _tile_loadconfig(&configuration);
  }
  FASTEWC_AMX_TARGET ~Unit() {
    _tile_release();
  }
};

constexpr int64_t SQUARE = PANEL * PANEL; // numbers in a product of panels: 2 · 2 tiles of 16 · 16

// Sums of a panel of rows and a panel of columns over the positions of one sample, [2, 2, 16, 16]. `more`: go on from
// what is in `sums`.
template <int PARTS>
FASTEWC_AMX_TARGET inline void multiply(
    const BFloat16* a, const BFloat16* b, const Steps& steps, bool more, float* sums) {
  if (more) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto load_a = [&](int part) FASTEWC_AMX_TARGET __attribute__((always_inline)) {
    _tile_loadd(4, a + 2 * part * TILE, 64);
    _tile_loadd(5, a + (2 * part + 1) * TILE, 64);
  };
  const auto load_b = [&](int part) FASTEWC_AMX_TARGET __attribute__((always_inline)) {
    _tile_loadd(6, b + 2 * part * TILE, 64);
    _tile_loadd(7, b + (2 * part + 1) * TILE, 64);
  };
  const auto product = [&]() FASTEWC_AMX_TARGET __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  for (int64_t step = 0; step < steps.full; ++step, a += 2 * PARTS * TILE, b += 2 * PARTS * TILE) {
    if constexpr (PARTS == 1) {
      load_a(0);
      load_b(0);
      product();
    } else {
#pragma GCC unroll 6
      for (int i = 0; i < PRODUCTS; ++i) {
        if (i == 0 || PART_OF_A[i] != PART_OF_A[i - 1]) {
          load_a(PART_OF_A[i]);
        }
        if (i == 0 || PART_OF_B[i] != PART_OF_B[i - 1]) {
          load_b(PART_OF_B[i]);
        }
        product();
      }
    }
  }
  for (int64_t tail = 0; tail < steps.tails; ++tail, a += 2 * TILE, b += 2 * TILE) {
    load_a(0);
    load_b(0);
    product();
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// total += |sums|^power
FASTEWC_AMX_TARGET inline void add_raised(const float* sums, Power power, float* total) {
  for (int64_t i = 0; i < SQUARE; i += SIDE) {
    _mm512_store_ps(total + i, _mm512_add_ps(_mm512_load_ps(total + i), raised(_mm512_load_ps(sums + i), power)));
  }
}

// A weight's total and its uses, seen from both sides.
struct Products {
  Channels rows, columns; // columns: neighbours in the total's memory, if any are
  int64_t samples, positions; // positions of a sample, of all uses together
  Power power;
  bool one_position; // the samples are positions, and their powers are multiplied
};

// Adds them all: samples in order, a few at a time, each as far as the second-level cache reaches.
template <int PARTS>
class Adder {
 public:
  Adder(const Products& products, float* total)
      : p_(products),
        total_(total),
        outer_is_rows_(products.rows.count >= products.columns.count),
        outer_(outer_is_rows_ ? products.rows : products.columns),
        inner_(outer_is_rows_ ? products.columns : products.rows),
        power_(products.one_position ? products.power : Power::identity),
        sums_power_(products.one_position ? Power::identity : products.power) {}

  void add() const {
    const int64_t positions = p_.one_position ? p_.samples : p_.positions;
    const int64_t samples = p_.one_position ? 1 : p_.samples;
    if (positions > RUN && !p_.one_position) {
      return add_long();
    }
    const int64_t most = std::min(RUN, positions);
    const int64_t chunk =
        std::max<int64_t>(1, RUN_BYTES / (inner_.panels() * Steps(most, PARTS).numbers(PARTS) * int64_t(sizeof(BFloat16))));
    for (int64_t t = 0; t < positions; t += most) {
      const Steps steps(std::min(most, positions - t), PARTS);
      for (int64_t n = 0; n < samples; n += chunk) {
        run(n, std::min(chunk, samples - n), t, steps, nullptr, true);
      }
    }
  }

 private:
  // Samples of more positions than a run has: their sums are collected.
  void add_long() const {
    const Buffer<float> sums(outer_.panels() * inner_.panels() * SQUARE);
    for (int64_t n = 0; n < p_.samples; ++n) {
      for (int64_t t = 0; t < p_.positions; t += RUN) {
        const int64_t count = std::min(RUN, p_.positions - t);
        run(n, 1, t, Steps(count, PARTS), sums.get(), t + count == p_.positions);
      }
    }
  }

  // Positions [t, t + steps.positions) of samples [first, first + count).
  void run(int64_t first, int64_t count, int64_t t, const Steps& steps, float* sums, bool last) const {
    const int64_t size = steps.numbers(PARTS), inner_panels = inner_.panels();
    const Packer<PARTS> inner_packer(inner_, !outer_is_rows_, power_), outer_packer(outer_, outer_is_rows_, power_);
    const Buffer<BFloat16> inner(inner_panels * count * size); // [panel, sample, size]
    const int64_t threads = torch::stable::get_num_threads(), panels = outer_.panels();
    const int64_t parts = std::min(inner_panels, count < 2 * threads ? threads : 1);
    torch::stable::parallel_for(0, count * parts, 1, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        const int64_t n = i / parts, begin = inner_panels * (i % parts) / parts;
        inner_packer.pack(
            begin, inner_panels * (i % parts + 1) / parts, first + n, t, steps, inner.get() + (begin * count + n) * size,
            count * size);
      }
    });
    const int64_t fit = std::max<int64_t>(1, RUN_BYTES / (count * size * int64_t(sizeof(BFloat16))));
    const int64_t groups = std::min(panels, (panels + fit * threads - 1) / (fit * threads) * threads);
    const int64_t group = (panels + groups - 1) / groups;
    torch::stable::parallel_for(0, groups, 1, [&](int64_t task, int64_t tasks) {
      const Unit unit;
      const Buffer<BFloat16> outer(group * count * size);
      const Buffer<float> own(2 * SQUARE);
      for (; task < tasks; ++task) {
        const int64_t begin = panels * task / groups, end = panels * (task + 1) / groups;
        for (int64_t n = 0; n < count; ++n) {
          outer_packer.pack(begin, end, first + n, t, steps, outer.get() + n * size, count * size);
        }
        for (int64_t panel = begin; panel < end; ++panel) {
          for (int64_t other = 0; other < inner_panels; ++other) {
            float *total = own.get(), *sum = sums ? sums + (panel * inner_panels + other) * SQUARE : total + SQUARE;
            std::fill(total, total + SQUARE, 0.f);
            fetch(outer_is_rows_ ? panel : other, outer_is_rows_ ? other : panel);
            for (int64_t n = 0; n < count; ++n) {
              const BFloat16* x = outer.get() + ((panel - begin) * count + n) * size;
              const BFloat16* y = inner.get() + (other * count + n) * size;
              multiply<PARTS>(outer_is_rows_ ? x : y, outer_is_rows_ ? y : x, steps, sums && t > 0, sum);
              if (last) {
                add_raised(sum, sums_power_, total);
              }
            }
            if (last) {
              flush(total, outer_is_rows_ ? panel : other, outer_is_rows_ ? other : panel);
            }
          }
        }
      }
    });
  }

  // Sends for the part of the total that flush() will add to.
  void fetch(int64_t row_panel, int64_t column_panel) const {
    const int64_t row = row_panel * PANEL, rows = std::min(PANEL, p_.rows.count - row);
    const float* from = total_ + row * p_.rows.total + column_panel * PANEL * p_.columns.total;
    for (int64_t r = 0; r < rows; ++r, from += p_.rows.total) {
      __builtin_prefetch(from, 1);
      __builtin_prefetch(from + SIDE, 1);
    }
  }

  FASTEWC_AMX_TARGET void flush(const float* square, int64_t row_panel, int64_t column_panel) const {
    const int64_t row = row_panel * PANEL, column = column_panel * PANEL, step = p_.columns.total;
    const int64_t rows = std::min(PANEL, p_.rows.count - row), columns = std::min(PANEL, p_.columns.count - column);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = total_ + (row + r) * p_.rows.total + column * step;
      for (int64_t first = 0; first < columns; first += SIDE) {
        const float* from = square + ((r / SIDE * 2 + first / SIDE) * SIDE + r % SIDE) * SIDE;
        const int64_t count = std::min(SIDE, columns - first);
        if (step == 1) {
          const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
          const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to + first), _mm512_load_ps(from));
          _mm512_mask_storeu_ps(to + first, mask, sum);
        } else {
          for (int64_t c = 0; c < count; ++c) {
            to[(first + c) * step] += from[c];
          }
        }
      }
    }
  }

  const Products& p_;
  float* const total_;
  const bool outer_is_rows_; // the side whose panels are packed once each, while the other's stay
  const Channels &outer_, &inner_;
  const Power power_, sums_power_; // of the numbers, and of their products' sums
};

// Whether the unit is faster than vectors, in cycles or so: 16 for a product of tiles, and what it costs to take a
// sample's sums out of it; 32 multiply-adds of float32 in one.
inline bool worthwhile(const Products& p) {
  if (p.one_position) {
    return p.samples >= 16;
  }
  const Steps steps(p.positions, 3);
  const double squares = static_cast<double>(p.rows.panels() * p.columns.panels());
  const double unit = squares * (64.0 * (PRODUCTS * steps.full + steps.tails) + 160.0);
  return unit < 1.3 / 32 * p.positions * p.rows.count * p.columns.count;
}

inline void add(const Products& products, bool exact_in_one, float* total) {
  if (exact_in_one && !products.one_position) {
    Adder<1>(products, total).add();
  } else {
    Adder<3>(products, total).add();
  }
}

} // namespace fastewc::amx
#endif
