// sum_grad_power of scales and biases on the CPU: what an activation is multiplied with, or has added to it.
//
// fastewc/ops/sum_grad_power/reference.py is the specification, schema.py beside it has the schemas. Nothing is contracted
// but positions, so all that counts is to read everything once, as it lies: vectors run along channels or along
// positions, whichever is dense, and a sample's sums stay in the first-level cache. The work is cut the same way for any
// number of threads, so their number changes no bit.
#include "pack_cpu.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

namespace fastewc {
namespace {

// Numbers of a row that are worked on at a time.
constexpr int64_t BLOCK = 512;
// Rows that are added up at a time: the sums are then loaded and stored once for all of them.
constexpr int ROWS_AT_ONCE = 4;
// Pieces that the work is cut into, and numbers below which a piece is not worth a thread. Rows are cut for fewer: short
// ones take longer.
constexpr int64_t PIECES = 64;
constexpr int64_t ROW_PIECES = 8;
constexpr int64_t LEAST_WORK = 1 << 14;
// A row of fewer channels than this is no row for vectors.
constexpr int64_t SHORT = 8;

enum Operand { G, X, SHIFT, FACTOR, OPERANDS };

// A dimension, and how far apart its entries are in each operand: 0 in one that is absent.
struct Axis {
  int64_t size;
  int64_t step[OPERANDS];
};

// What one use of the parameter is given: y = w x̂ with x̂ = (x − shift) factor.
struct Uses {
  std::vector<Tensor> g;
  std::vector<std::optional<Tensor>> x, shift, factor;
};

struct ScaleUse {
  const void* data[OPERANDS];
  int64_t sample[OPERANDS];
  std::vector<Axis> channels, positions; // without those of size 1; the last ones vary fastest
  bool along_positions; // vectors run along the last of the positions, else along the last of the channels
};

// Axes of size 1 are dropped, and neighbours become one where every operand can walk both as one.
void merge_channels(std::vector<ScaleUse>& uses) {
  const auto mergeable = [&](size_t at) {
    return std::all_of(uses.begin(), uses.end(), [&](const ScaleUse& use) {
      const Axis &outer = use.channels[at], &inner = use.channels[at + 1];
      return std::equal(outer.step, outer.step + OPERANDS, inner.step, [&](int64_t a, int64_t b) {
        return a == b * inner.size;
      });
    });
  };
  for (size_t at = uses[0].channels.size(); at-- > 1;) {
    if (mergeable(at - 1)) {
      for (ScaleUse& use : uses) {
        use.channels[at].size *= use.channels[at - 1].size;
        use.channels.erase(use.channels.begin() + at - 1);
      }
    }
  }
}

void merge_positions(std::vector<Axis>& axes) {
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.step[G] > b.step[G]; });
  for (size_t at = axes.size(); at-- > 1;) {
    const Axis outer = axes[at - 1];
    Axis& inner = axes[at];
    bool one = true;
    for (int k = 0; k < OPERANDS; ++k) {
      one = one && outer.step[k] == inner.step[k] * inner.size;
    }
    if (one) {
      inner.size *= outer.size;
      axes.erase(axes.begin() + at - 1);
    }
  }
}

int64_t volume(const std::vector<Axis>& axes) {
  return std::accumulate(axes.begin(), axes.end(), int64_t(1), [](int64_t product, const Axis& axis) {
    return product * axis.size;
  });
}

// Where a use's operands are read. Those of the arithmetic's type are shift and factor.
template <typename T, typename M>
struct Place {
  const T *g, *x;
  const M *shift, *factor;

  explicit Place(const ScaleUse& use)
      : g(static_cast<const T*>(use.data[G])),
        x(static_cast<const T*>(use.data[X])),
        shift(static_cast<const M*>(use.data[SHIFT])),
        factor(static_cast<const M*>(use.data[FACTOR])) {}

  // `count` steps on. (Null pointers have steps of 0.)
  FASTEWC_INLINE Place moved(const int64_t (&step)[OPERANDS], int64_t count) const {
    Place to = *this;
    to.g += count * step[G];
    to.x += count * step[X];
    to.shift += count * step[SHIFT];
    to.factor += count * step[FACTOR];
    return to;
  }

  // At entry `index` of all axes but the last `without` ones.
  FASTEWC_INLINE Place at(const std::vector<Axis>& axes, size_t without, int64_t index) const {
    Place to = *this;
    for (size_t i = axes.size() - std::min(without, axes.size()); i-- > 0 && index > 0;) {
      to = to.moved(axes[i].step, index % axes[i].size);
      index /= axes[i].size;
    }
    return to;
  }
};

// n numbers side by side: where they lie, if they lie so, else in `row`.
template <typename T, typename M>
FASTEWC_INLINE const M* side_by_side(const T* from, int64_t step, int64_t n, M* row) {
  if constexpr (std::is_same_v<T, M>) {
    if (step == 1) {
      return from;
    }
  }
  if (step == 1) {
    convert(from, row, n);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      row[i] = static_cast<M>(to_float(from[i * step]));
    }
  }
  return row;
}

// n numbers x̂ along an axis.
template <typename T, typename M>
FASTEWC_INLINE const M* normalised(const Place<T, M>& place, const Axis& axis, int64_t n, M* row) {
  const M* x = side_by_side(place.x, axis.step[X], n, row);
  const M *shift = place.shift, *factor = place.factor;
  if (!shift && !factor) {
    return x;
  }
  // One number for the row, as layer norms have it, is the common case; what is absent changes no bit.
  const M none[2] = {0, 1};
  shift = shift ? shift : none;
  factor = factor ? factor : none + 1;
  const int64_t shift_step = axis.step[SHIFT], factor_step = axis.step[FACTOR];
  if (shift_step == 0 && factor_step == 0) {
    const M a = *shift, b = *factor;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      row[i] = (x[i] - a) * b;
    }
  } else if (shift_step == 1 && factor_step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      row[i] = (x[i] - shift[i]) * factor[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      row[i] = (x[i] - shift[i * shift_step]) * factor[i * factor_step];
    }
  }
  return row;
}

// to[i] += Σ_k |g_k[i] x_k[i]|^POWER, where x_k may be absent.
template <Power POWER, bool SCALED, int COUNT, typename M>
FASTEWC_INLINE void add_products(const M* const* g, const M* const* x, int64_t n, M* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    M sum = to[i];
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k) {
      const M value = SCALED ? g[k][i] * x[k][i] : g[k][i];
      sum += POWER == Power::identity ? value : POWER == Power::absolute ? std::fabs(value) : value * value;
    }
    to[i] = sum;
  }
}

// The same for one row, or ROWS_AT_ONCE.
template <typename M>
FASTEWC_INLINE void combine(const M* const* g, const M* const* x, bool all, Power power, int64_t n, M* to) {
  const auto of_power = [&]<Power POWER>() FASTEWC_INLINE_LAMBDA {
    if (all) {
      x[0] ? add_products<POWER, true, ROWS_AT_ONCE>(g, x, n, to) : add_products<POWER, false, ROWS_AT_ONCE>(g, x, n, to);
    } else {
      x[0] ? add_products<POWER, true, 1>(g, x, n, to) : add_products<POWER, false, 1>(g, x, n, to);
    }
  };
  switch (power) {
    case Power::identity:
      return of_power.template operator()<Power::identity>();
    case Power::absolute:
      return of_power.template operator()<Power::absolute>();
    case Power::square:
      return of_power.template operator()<Power::square>();
  }
}

// Work space: rows of ROWS_AT_ONCE entries, g and x of each.
template <typename M>
using Rows = M[ROWS_AT_ONCE][2][BLOCK];

// to[i] += Σ |g x̂|^power over an axis, with i along another one.
template <typename T, typename M>
FASTEWC_INLINE void add_rows(
    const Place<T, M>& place, const int64_t (&step)[OPERANDS], int64_t count, const Axis& along, Power power, int64_t n,
    M* to, Rows<M>& rows) {
  for (int64_t first = 0; first < count; first += ROWS_AT_ONCE) {
    const M *g[ROWS_AT_ONCE], *x[ROWS_AT_ONCE];
    const int64_t present = std::min<int64_t>(ROWS_AT_ONCE, count - first);
    for (int64_t k = 0; k < present; ++k) {
      const Place<T, M> here = place.moved(step, first + k);
      g[k] = side_by_side(here.g, along.step[G], n, rows[k][0]);
      x[k] = here.x ? normalised(here, along, n, rows[k][1]) : nullptr;
    }
    const bool all = present == ROWS_AT_ONCE;
    for (int64_t k = 0; k < present; k += all ? ROWS_AT_ONCE : 1) {
      combine(g + k, x + k, all, power, n, to);
    }
  }
}

// Σ f(i) for i < n. A whole block in four sums, of a quarter each: one would wait for itself. (In a shorter one adding up
// the lanes of four costs more than that.)
template <typename M, typename F>
FASTEWC_INLINE M sum_of(int64_t n, const F& f) {
  M a = 0;
  if (n < BLOCK) {
#pragma omp simd reduction(+ : a)
    for (int64_t i = 0; i < n; ++i) {
      a += f(i);
    }
    return a;
  }
  constexpr int64_t QUARTER = BLOCK / 4;
  M b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < QUARTER; ++i) {
    a += f(i);
    b += f(i + QUARTER);
    c += f(i + 2 * QUARTER);
    d += f(i + 3 * QUARTER);
  }
  return (a + b) + (c + d);
}

// Σ g x̂ along an axis.
template <typename T, typename M>
FASTEWC_INLINE M dot(Place<T, M> place, const Axis& axis, Rows<M>& rows) {
  M sum = 0;
  for (int64_t left = axis.size; left > 0; left -= BLOCK, place = place.moved(axis.step, BLOCK)) {
    const int64_t n = std::min(left, BLOCK);
    const M* g = side_by_side(place.g, axis.step[G], n, rows[0][0]);
    if (place.x) {
      const M* x = normalised(place, axis, n, rows[0][1]);
      sum += sum_of<M>(n, [&](int64_t i) FASTEWC_INLINE_LAMBDA { return g[i] * x[i]; });
    } else {
      sum += sum_of<M>(n, [&](int64_t i) FASTEWC_INLINE_LAMBDA { return g[i]; });
    }
  }
  return sum;
}

constexpr Axis NO_AXIS = {1, {}};

// sum[i] += Σ_t g x̂ of n channels of a sample.
template <typename T, typename M>
FASTEWC_INLINE void add_positions(
    const ScaleUse& use, const Place<T, M>& place, const Axis& row, int64_t n, M* sum, Rows<M>& rows) {
  const Axis& last = use.positions.empty() ? NO_AXIS : use.positions.back();
  const int64_t outer = volume(use.positions) / std::max<int64_t>(1, last.size);
  for (int64_t o = 0; o < outer; ++o) {
    const Place<T, M> here = place.at(use.positions, 1, o);
    if (use.along_positions) {
      for (int64_t i = 0; i < n; ++i) {
        sum[i] += dot(here.moved(row.step, i), last, rows);
      }
    } else {
      add_rows(here, last.step, last.size, row, Power::identity, n, sum, rows);
    }
  }
}

struct Cut {
  int64_t rows = 0, pieces = 0, width = 0; // rows of channels, pieces of a row, and their size
  int64_t chunks = 0, chunk = 0; // of samples, and their size
};

// What all uses have in common.
struct ScaleProblem {
  int64_t samples, channels;
  Power power;
  std::vector<ScaleUse> uses;
  Cut cut;

  const Axis& row(size_t use = 0) const {
    return uses[use].channels.empty() ? NO_AXIS : uses[use].channels.back();
  }
};

// Σ_n |Σ_uses Σ_t g x̂|^power of n channels of a row, over a chunk of samples.
template <typename T, typename M>
FASTEWC_INLINE void add_piece(
    const ScaleProblem& problem, int64_t row, int64_t first, int64_t n, int64_t begin, int64_t end, M* to) {
  alignas(64) M total[BLOCK];
  alignas(64) M sum[BLOCK];
  alignas(64) Rows<M> rows;
  const auto start = [&](size_t i, int64_t sample) FASTEWC_INLINE_LAMBDA {
    const ScaleUse& use = problem.uses[i];
    return Place<T, M>(use).at(use.channels, 1, row).moved(problem.row(i).step, first).moved(use.sample, sample);
  };
  std::fill(total, total + n, M(0));
  const ScaleUse& only = problem.uses[0];
  if (problem.uses.size() == 1 && only.positions.empty()) { // nothing comes between a product and its power
    add_rows(start(0, begin), only.sample, end - begin, problem.row(), problem.power, n, total, rows);
    begin = end;
  }
  for (int64_t sample = begin; sample < end; ++sample) {
    std::fill(sum, sum + n, M(0));
    for (size_t i = 0; i < problem.uses.size(); ++i) {
      add_positions(problem.uses[i], start(i, sample), problem.row(i), n, sum, rows);
    }
    const M* const sums = sum;
    const M* const none = nullptr;
    combine(&sums, &none, false, problem.power, n, total);
  }
  std::copy(total, total + n, to);
}

// Pieces of about equal size, if there is so much to do: first of samples, then of channels.
Cut cut_up(const ScaleProblem& problem, int64_t numbers) {
  const auto over = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t R = problem.row().size, wanted = std::clamp<int64_t>(numbers / LEAST_WORK, 1, PIECES);
  Cut cut;
  cut.rows = problem.channels / R;
  cut.width = std::min(R, BLOCK);
  cut.pieces = over(R, cut.width);
  cut.chunk = over(problem.samples, std::min(problem.samples, over(wanted, cut.rows * cut.pieces)));
  cut.chunks = over(problem.samples, cut.chunk);
  const int64_t more = over(std::min(wanted, ROW_PIECES), cut.chunks * cut.rows);
  if (more > cut.pieces) {
    cut.width = std::min(cut.width, over(over(R, more), 16) * 16); // whole lines of a cache
    cut.pieces = over(R, cut.width);
  }
  return cut;
}

template <typename T, typename M>
void add_pieces(const ScaleProblem& problem, int64_t numbers, M* parts) {
  const Cut& cut = problem.cut;
  const int64_t tasks = cut.rows * cut.pieces * cut.chunks;
  const int64_t grain = std::max<int64_t>(1, tasks * LEAST_WORK / std::max<int64_t>(numbers, 1));
  torch::stable::parallel_for(0, tasks, std::min(grain, tasks), [&](int64_t from, int64_t end) {
    vectorised<M>([&]() FASTEWC_INLINE_LAMBDA {
      for (int64_t task = from; task < end; ++task) {
        const int64_t chunk = task % cut.chunks, piece = task / cut.chunks % cut.pieces;
        const int64_t row = task / cut.chunks / cut.pieces, first = piece * cut.width, R = problem.row().size;
        add_piece<T>(
            problem, row, first, std::min(cut.width, R - first), chunk * cut.chunk,
            std::min(problem.samples, (chunk + 1) * cut.chunk), parts + chunk * problem.channels + row * R + first);
      }
    });
  });
}

// total += the parts of the chunks, one after the other.
template <typename M>
void gather(const Tensor& total, int64_t chunks, M* parts) {
  const int64_t C = total.numel();
  for (int64_t k = 1; k < chunks; ++k) {
    for (int64_t c = 0; c < C; ++c) {
      parts[c] += parts[k * C + c];
    }
  }
  M* to = static_cast<M*>(total.mutable_data_ptr());
  const bool dense = total.is_contiguous();
  for (int64_t c = 0; c < C; ++c) {
    int64_t offset = dense ? c : 0;
    for (int64_t d = total.dim(), index = c; !dense && d-- > 0; index /= total.size(d)) {
      offset += index % total.size(d) * total.stride(d);
    }
    to[offset] += parts[c];
  }
}

// Shapes are checked here, dimension by dimension from the last one on.
ScaleUse scale_use(const Tensor& total, const Uses& uses, size_t i, int64_t samples) {
  const Tensor& g = uses.g[i];
  const std::optional<Tensor> operands[OPERANDS] = {g, uses.x[i], uses.shift[i], uses.factor[i]};
  ScaleUse use = {};
  for (const auto& operand : operands) {
    bool fits = g.dim() > total.dim() && g.size(0) == samples && (!operand || operand->dim() == g.dim());
    for (int64_t d = 0; fits && operand && d < g.dim(); ++d) {
      fits = operand->size(d) == g.size(d);
    }
    for (int64_t d = 0; fits && d < total.dim(); ++d) {
      const int64_t size = total.size(d);
      fits = size == 1 || size == g.size(g.dim() - total.dim() + d);
    }
    STD_TORCH_CHECK(
        fits, "sum_grad_power: wanted g, x, shift and factor of one shape [N, ...] to which a total ", shape_of(total),
        " broadcasts, with N ", samples, ", given g ", shape_of(g), " and ", shape_of(operand ? *operand : g));
  }
  for (int64_t d = 0; d < g.dim(); ++d) {
    Axis axis{g.size(d), {}};
    for (int k = 0; k < OPERANDS; ++k) {
      axis.step[k] = operands[k] ? operands[k]->stride(d) : 0;
    }
    const int64_t in_total = d - (g.dim() - total.dim());
    if (d == 0) {
      std::copy_n(axis.step, OPERANDS, use.sample);
    } else if (axis.size != 1) {
      (in_total >= 0 && total.size(in_total) != 1 ? use.channels : use.positions).push_back(axis);
    }
  }
  for (int k = 0; k < OPERANDS; ++k) {
    use.data[k] = operands[k] ? operands[k]->const_data_ptr() : nullptr;
  }
  merge_positions(use.positions);
  return use;
}

// What vectors can run along: 2 what lies side by side, 1 what is long enough, 0 the rest.
int rank(const Axis& axis) {
  return axis.size < SHORT ? 0 : axis.step[G] == 1 ? 2 : 1;
}

void check_types(const Tensor& total, const Uses& uses) {
  STD_TORCH_CHECK(
      uses.x.size() == uses.g.size() && uses.shift.size() == uses.g.size() && uses.factor.size() == uses.g.size(),
      "sum_grad_power: wanted as many x, shift and factor as g, given ", uses.x.size(), ", ", uses.shift.size(), ", ",
      uses.factor.size(), " and ", uses.g.size());
  for (size_t i = 0; i < uses.g.size(); ++i) {
    const ScalarType dtype = uses.g[0].scalar_type();
    const auto check = [](const std::optional<Tensor>& t, ScalarType wanted) {
      STD_TORCH_CHECK(
          !t || (t->is_cpu() && t->scalar_type() == wanted), "sum_grad_power: wanted CPU tensors, here of ",
          name_of(wanted), ", given ", t ? name_of(t->scalar_type()) : "");
    };
    check(uses.g[i], dtype);
    check(uses.x[i], dtype);
    check(uses.shift[i], total.scalar_type());
    check(uses.factor[i], total.scalar_type());
    STD_TORCH_CHECK(
        uses.x[i] || !(uses.shift[i] || uses.factor[i]), "sum_grad_power: wanted x with a shift or a factor, given none");
  }
}

void add_scale_grad_power_cpu(
    Tensor total, std::vector<Tensor> g, std::vector<std::optional<Tensor>> x, std::vector<std::optional<Tensor>> shift,
    std::vector<std::optional<Tensor>> factor, int64_t p) {
  STD_TORCH_CHECK(p == 1 || p == 2, "sum_grad_power: wanted p 1 or 2, given ", p);
  const Uses uses{std::move(g), std::move(x), std::move(shift), std::move(factor)};
  check_types(total, uses);
  if (uses.g.empty() || total.numel() == 0 || uses.g[0].size(0) == 0) {
    return;
  }
  ScaleProblem problem{uses.g[0].size(0), total.numel(), p == 1 ? Power::absolute : Power::square, {}, {}};
  int64_t numbers = 0;
  for (size_t i = 0; i < uses.g.size(); ++i) {
    problem.uses.push_back(scale_use(total, uses, i, problem.samples));
    numbers += uses.g[i].numel();
  }
  merge_channels(problem.uses);
  for (ScaleUse& use : problem.uses) {
    const Axis &row = problem.row(), &last = use.positions.empty() ? NO_AXIS : use.positions.back();
    const int own = use.channels.empty() ? 0 : rank(use.channels.back()), other = rank(last);
    use.along_positions = other > own || (other == own && own < 2 && last.size > row.size);
  }
  problem.cut = cut_up(problem, numbers);
  dispatch_floating("sum_grad_power", uses.g[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = op_math_t<T>;
    STD_TORCH_CHECK(
        total.is_cpu() && total.scalar_type() == math_dtype<M>, "sum_grad_power: wanted a total of ",
        name_of(math_dtype<M>), " for ", name_of(uses.g[0].scalar_type()), ", given ", name_of(total.scalar_type()));
    const Buffer<M> parts(problem.cut.chunks * problem.channels);
    add_pieces<T>(problem, numbers, parts.get());
    gather(total, problem.cut.chunks, parts.get());
  });
}

// ---- what a norm subtracts and multiplies with ----

// Calls f(numbers, n) for a row, some numbers at a time.
template <typename T, typename M, typename F>
FASTEWC_INLINE void blocks_of(const T* from, int64_t size, M* row, const F& f) {
  for (int64_t i = 0; i < size; i += BLOCK) {
    const int64_t n = std::min(BLOCK, size - i);
    f(side_by_side(from + i, 1, n, row), n);
  }
}

// The mean, and 1/√(mean of (x − mean)² + eps); blocks are added up in double.
template <typename T, typename M>
FASTEWC_INLINE void moments_of(const T* x, int64_t size, double eps, bool centred, M* shift, M* factor) {
  alignas(64) M row[BLOCK];
  double sum = 0, squares = 0;
  if (centred) {
    blocks_of(x, size, row, [&](const M* numbers, int64_t n) FASTEWC_INLINE_LAMBDA {
      sum += sum_of<M>(n, [&](int64_t i) FASTEWC_INLINE_LAMBDA { return numbers[i]; });
    });
  }
  const M mean = static_cast<M>(sum / static_cast<double>(size));
  blocks_of(x, size, row, [&](const M* numbers, int64_t n) FASTEWC_INLINE_LAMBDA {
    squares += sum_of<M>(n, [&](int64_t i) FASTEWC_INLINE_LAMBDA {
      const M distance = numbers[i] - mean;
      return distance * distance;
    });
  });
  *shift = mean;
  *factor = static_cast<M>(1 / std::sqrt(squares / static_cast<double>(size) + eps));
}

void row_moments_cpu(Tensor shift, Tensor factor, const Tensor& x, double eps, bool centred) {
  const int64_t rows = shift.numel(), size = rows ? x.numel() / rows : 0;
  STD_TORCH_CHECK(
      x.dim() >= 1 && rows == factor.numel() && rows * x.size(x.dim() - 1) == x.numel() && shift.is_contiguous() &&
          factor.is_contiguous() && shift.is_cpu() && factor.is_cpu() && x.is_cpu(),
      "row_moments: wanted x [..., R] with shift and factor [..., 1] side by side, on the CPU, given ", shape_of(x), ", ",
      shape_of(shift), " and ", shape_of(factor));
  const Tensor dense = torch::stable::contiguous(x);
  dispatch_floating("row_moments", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using M = op_math_t<T>;
    STD_TORCH_CHECK(
        shift.scalar_type() == math_dtype<M> && factor.scalar_type() == math_dtype<M>, "row_moments: wanted ",
        name_of(math_dtype<M>), " for ", name_of(x.scalar_type()), ", given ", name_of(shift.scalar_type()), " and ",
        name_of(factor.scalar_type()));
    const T* from = static_cast<const T*>(dense.const_data_ptr());
    M* means = static_cast<M*>(shift.mutable_data_ptr());
    M* factors = static_cast<M*>(factor.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, LEAST_WORK / std::max<int64_t>(size, 1));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      vectorised<M>([&]() FASTEWC_INLINE_LAMBDA {
        for (int64_t r = begin; r < end; ++r) {
          moments_of(from + r * size, size, eps, centred, means + r, factors + r);
        }
      });
    });
  });
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CPU, m) {
  m.impl("add_scale_grad_power", TORCH_BOX(&fastewc::add_scale_grad_power_cpu));
  m.impl("row_moments", TORCH_BOX(&fastewc::row_moments_cpu));
}
