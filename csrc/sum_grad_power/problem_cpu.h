// What the kernel is to do, as tables of offsets: linear layers and convolutions of any strides become one walk.
#pragma once

#include "pack_cpu.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastewc {

// A tensor [N, channels, D, H, W] where it lies.
struct View {
  const void* data;
  ScalarType dtype;
  int64_t channels, sample, channel; // how many, and steps in memory
  Space space;
  int64_t stride[3] = {0, 0, 0};

  // [N, channels, up to three spatial dimensions]
  static View image(const Tensor& t) {
    View view{t.const_data_ptr(), t.scalar_type(), t.size(1), t.stride(0), t.stride(1), {}};
    for (int64_t d = 2, to = 5 - t.dim(); d < t.dim(); ++d, ++to) {
      view.space.size[to] = t.size(d);
      view.stride[to] = t.stride(d);
    }
    return view;
  }

  // [N, T, features]: an image of one dimension
  static View sequence(const Tensor& t) {
    return {t.const_data_ptr(), t.scalar_type(), t.size(2), t.stride(0), t.stride(2), {{1, 1, t.size(1)}},
            {0, 0, t.stride(1)}};
  }
};

struct Window {
  Space kernel;
  int64_t stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0}, dilation[3] = {1, 1, 1};

  // Whether each input meets each gradient at one position only, as in a linear layer.
  bool plain() const {
    return kernel.volume() == 1 && padding[0] + padding[1] + padding[2] == 0;
  }
};

// Offsets of all points of a space, the last dimension fastest.
inline std::vector<int64_t> offsets(const Space& space, const int64_t (&step)[3], const int64_t (&times)[3]) {
  std::vector<int64_t> found;
  found.reserve(space.volume());
  for (int64_t d = 0; d < space.size[0]; ++d) {
    for (int64_t h = 0; h < space.size[1]; ++h) {
      for (int64_t w = 0; w < space.size[2]; ++w) {
        found.push_back(d * step[0] * times[0] + h * step[1] * times[1] + w * step[2] * times[2]);
      }
    }
  }
  return found;
}
constexpr int64_t ONCE[3] = {1, 1, 1};

// How x is brought into the form in which the micro-kernel reads it.
enum class Form {
  as_it_lies,
  tiles, // [sample, group, tile of ROWS channels, position, ROWS]: converted, and raised where T = 1
  planes, // [sample, channel, padded space]: converted
  lanes, // [sample, panel, channel of a group, padded space, lane]: a number for each lane
};

// Numbers that fill an odd count of cache lines: in memory that far apart, neighbours do not evict each other.
inline int64_t whole_lines(int64_t numbers) {
  return ((numbers + 15) / 16 | 1) * 16;
}

// One use of the weight.
struct Use {
  View g; // the side with the lanes
  std::vector<int64_t> g_position;
  View x;
  Form form;
  Space padded; // of planes and lanes
  int64_t size = 0; // numbers of a sample in that form
  int64_t sample = 0, group = 0, panel = 0, tile = 0; // steps
  std::vector<int64_t> position, row; // ditto; rows are filled up to whole tiles

  int64_t positions() const {
    return static_cast<int64_t>(g_position.size());
  }
};

// Longest run of positions for which a panel stays in the first-level cache.
constexpr int64_t MAX_POSITIONS = 256;

// A weight's total and its uses. Rows are numbers of x, lanes those of g (or the other way round); see tile_cpu.h.
struct Problem {
  int64_t samples, groups, lanes, rows; // lanes and rows are those of a group
  int64_t width; // lanes of a panel
  Power power;
  bool one_position = false; // T = 1: one product of powers, contracted over samples
  bool lanes_of_x = false;
  int64_t total_lane, total_group; // steps in the total
  std::vector<int64_t> total_row;
  std::vector<Use> uses;
  Window window;

  int64_t panels() const {
    return (lanes + width - 1) / width;
  }
  int64_t tiles() const {
    return (rows + ROWS - 1) / ROWS;
  }
  int64_t positions() const {
    int64_t sum = 0;
    for (const Use& use : uses) {
      sum += use.positions();
    }
    return sum;
  }
};

// The tables of x in the form that it has been given.
inline void arrange(Use& use, const Problem& problem, Form form) {
  const Window& window = problem.window;
  const int64_t K = window.kernel.volume(), channels = problem.rows / K, all_rows = problem.tiles() * ROWS;
  use.form = form;
  if (form == Form::tiles) {
    // The samples of a run become its positions where T = 1.
    const int64_t T = problem.one_position ? MAX_POSITIONS : use.positions();
    use.tile = whole_lines(T * ROWS);
    use.group = problem.tiles() * use.tile;
    use.sample = problem.groups * use.group;
    for (int64_t t = 0; t < T; ++t) {
      use.position.push_back(t * ROWS);
    }
    for (int64_t r = 0; r < all_rows; ++r) {
      use.row.push_back(r / ROWS * use.tile + r % ROWS);
    }
    use.size = use.sample;
    return;
  }
  int64_t channel = use.x.channel, step[3] = {use.x.stride[0], use.x.stride[1], use.x.stride[2]};
  use.sample = use.x.sample;
  use.size = use.x.channels * use.x.space.volume();
  if (form != Form::as_it_lies) {
    for (int d = 0; d < 3; ++d) {
      use.padded.size[d] = use.x.space.size[d] + 2 * window.padding[d];
    }
    step[2] = form == Form::lanes ? problem.width : 1;
    step[1] = step[2] * use.padded.size[2];
    step[0] = step[1] * use.padded.size[1];
    channel = step[0] * use.padded.size[0];
    use.panel = form == Form::lanes ? channels * channel : 0;
    use.sample = form == Form::lanes ? problem.panels() * use.panel : use.x.channels * channel;
    use.size = use.sample;
  }
  use.group = channels * channel;
  use.position = offsets(use.g.space, step, window.stride);
  const std::vector<int64_t> kernel = offsets(window.kernel, step, window.dilation);
  for (int64_t r = 0; r < all_rows; ++r) {
    const int64_t own = std::min(r, problem.rows - 1); // what is beyond the last row is computed for nothing
    use.row.push_back(own / K * channel + kernel[own % K]);
  }
}

// ---- x of samples [first, first + count) is brought into its form ----

// Calls f(i) for all i < items, compiled for the widest vectors; each of them makes `size` numbers.
template <typename M, typename F>
void parallel_vectorised(int64_t items, int64_t size, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    vectorised<M>([&]() FASTEWC_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; ++i) {
        f(i);
      }
    });
  });
}

// Runs of samples where T = 1, else samples; a few positions at a time.
template <typename T, typename M>
void prepare_tiles(const Use& use, const Problem& problem, const T* from, int64_t count, M* to) {
  constexpr int64_t PART = 32;
  const bool runs = problem.one_position;
  const std::vector<int64_t> position = runs ? offsets({{1, 1, MAX_POSITIONS}}, {0, 0, use.x.sample}, ONCE)
                                             : offsets(use.g.space, use.x.stride, problem.window.stride);
  const int64_t step = runs ? MAX_POSITIONS : 1, whole = static_cast<int64_t>(position.size());
  const int64_t parts = (whole + PART - 1) / PART, size = problem.tiles() * ROWS;
  const int64_t items = (count + step - 1) / step * problem.groups * parts;
  parallel_vectorised<M>(items, size * PART, [&](int64_t item) FASTEWC_INLINE_LAMBDA {
    const int64_t i = item / parts / problem.groups, group = item / parts % problem.groups, t = item % parts * PART;
    const int64_t positions = std::min(PART, (runs ? std::min(whole, count - i * step) : whole) - t);
    const Buffer<M> row(size);
    pack_tiles(
        from + i * step * use.x.sample + group * problem.rows * use.x.channel, use.x.channel, position.data() + t,
        positions, problem.rows, use.tile, runs ? problem.power : Power::identity, row.get(),
        to + i * use.sample + group * use.group + t * ROWS);
  });
}

template <typename T, typename M>
void prepare_planes(const Use& use, const Problem& problem, const T* from, int64_t count, M* to) {
  const int64_t plane = use.padded.volume();
  parallel_vectorised<M>(count * use.x.channels, plane, [&](int64_t item) FASTEWC_INLINE_LAMBDA {
    const int64_t n = item / use.x.channels, c = item % use.x.channels;
    M* target = to + item * plane;
    std::fill(target, target + plane, M(0));
    place(
        from + n * use.x.sample + c * use.x.channel, use.x.space, use.x.stride, use.padded, problem.window.padding, 1,
        target);
  });
}

// Every lane has the channels that its output reads.
template <typename T, typename M>
void prepare_lanes(const Use& use, const Problem& problem, const T* from, int64_t count, M* to) {
  const int64_t width = problem.width, channels = problem.rows / problem.window.kernel.volume();
  const int64_t outputs = problem.lanes * channels / use.x.channels; // of a group of the convolution
  parallel_vectorised<M>(count * problem.panels(), use.panel, [&](int64_t item) FASTEWC_INLINE_LAMBDA {
    const int64_t n = item / problem.panels(), first = item % problem.panels() * width;
    M* target = to + item * use.panel;
    std::fill(target, target + use.panel, M(0));
    for (int64_t o = first; o < std::min(first + width, problem.lanes); ++o) {
      for (int64_t c = 0; c < channels; ++c) {
        place(
            from + n * use.x.sample + (o / outputs * channels + c) * use.x.channel, use.x.space, use.x.stride,
            use.padded, problem.window.padding, width, target + c * use.padded.volume() * width + o - first);
      }
    }
  });
}

template <typename M>
void prepare(const Use& use, const Problem& problem, int64_t first, int64_t count, M* to) {
  with_elements<M>(use.x.data, use.x.dtype, [&](const auto* data) {
    const auto* from = data + first * use.x.sample;
    switch (use.form) {
      case Form::tiles:
        return prepare_tiles(use, problem, from, count, to);
      case Form::planes:
        return prepare_planes(use, problem, from, count, to);
      case Form::lanes:
        return prepare_lanes(use, problem, from, count, to);
      case Form::as_it_lies:
        return;
    }
  });
}

} // namespace fastewc
