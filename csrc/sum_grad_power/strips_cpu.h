// The work, cut into strips of the total: a panel of lanes times a block of rows.
//
// A strip belongs to one thread, which walks over the samples in order, a few at a time: it packs their gradients into
// a panel that stays in the first-level cache, and lets the micro-kernel pass over it once for every tile of the strip.
// So the order of all sums is fixed, and the total is read and written once per chunk of samples.
#pragma once

#include "problem_cpu.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastewc {

// Rows of a strip at most, so that it stays in the second-level cache.
constexpr int64_t STRIP_ROWS = 768;
// Bytes of x that the panels pass over at a time.
constexpr int64_t CHUNK_BYTES = 1 << 20;
// Cycles of work, or so, below which it takes longer to wake a thread.
constexpr int64_t SERIAL_WORK = 1 << 14;

// How the strips are dealt to threads. Splits are ranges of samples whose totals are added up in the end.
struct Plan {
  int64_t panels, blocks, block_tiles, splits, tasks;
};

// The plan of least time. Units are those of one row at one position, a cycle or so: packing a position costs as much
// as 20 rows, and adding a row to the total as much as 20 positions.
inline Plan plan(const Problem& problem, int64_t samples, int64_t runs, int64_t threads) {
  const int64_t positions = samples * problem.positions();
  const int64_t panels = problem.groups * problem.panels();
  Plan best{};
  double least = -1;
  const auto consider = [&](int64_t wanted_blocks, int64_t splits) {
    const int64_t block_tiles = (problem.tiles() + wanted_blocks - 1) / wanted_blocks, rows = block_tiles * ROWS;
    const int64_t blocks = (problem.tiles() + block_tiles - 1) / block_tiles, tasks = panels * blocks * splits;
    const double own = static_cast<double>(positions) / splits * (rows + 20) + 20.0 * rows;
    const double all = own * ((tasks + threads - 1) / threads);
    if (least < 0 || all < least) {
      least = all;
      best = {panels, blocks, block_tiles, splits, tasks};
    }
  };
  const int64_t fewest = (problem.tiles() * ROWS + STRIP_ROWS - 1) / STRIP_ROWS;
  for (int64_t blocks = fewest; blocks <= std::min(problem.tiles(), fewest + 2 * threads); ++blocks) {
    const int64_t most_splits = std::max<int64_t>(1, 4 * threads / (panels * blocks));
    for (int64_t splits = 1; splits <= std::min({runs, threads, most_splits}); ++splits) {
      consider(blocks, splits);
    }
  }
  return best;
}

// Work space of a thread.
template <typename M>
struct Scratch {
  Buffer<M> panel, sums;
  std::vector<Walk<M>> walks;

  Scratch() = default;
  Scratch(const Problem& problem, int64_t strip_size)
      : panel(MAX_POSITIONS * problem.width), sums(problem.positions() > MAX_POSITIONS ? strip_size : 0) {}
};

// One strip over a range of samples.
template <typename M>
class Strip {
 public:
  Strip(
      const Problem& problem, const std::vector<const M*>& x, Scratch<M>& scratch, int64_t first, int64_t panel,
      int64_t tile, int64_t tiles)
      : problem_(problem),
        x_(x),
        scratch_(scratch),
        function_(problem.lanes_of_x ? this_machine<M>().tile_of_lanes : this_machine<M>().tile),
        first_(first),
        group_(panel / problem.panels()),
        panel_(panel % problem.panels()),
        lanes_(std::min(problem.width, problem.lanes - panel_ * problem.width)),
        tile_(tile),
        tiles_(tiles) {}

  // Adds samples [begin, end) to the strip's totals [rows, width].
  void add(int64_t begin, int64_t end, M* strip) const {
    const int64_t T = problem_.positions();
    if (problem_.one_position) {
      // The samples of a run are its positions.
      for (int64_t n = begin; n < end; n += MAX_POSITIONS) {
        const int64_t count = std::min(MAX_POSITIONS, end - n);
        pack(problem_.uses[0], n, 0, count, scratch_.panel.get());
        scratch_.walks.assign(1, walk(0, n, 0, count));
        run(1, Power::identity, strip);
      }
    } else if (T <= MAX_POSITIONS) {
      const int64_t most = std::max<int64_t>(1, MAX_POSITIONS / std::max<int64_t>(1, T));
      for (int64_t n = begin; n < end; n += most) {
        const int64_t count = std::min(most, end - n);
        add_short(n, count, strip);
      }
    } else {
      for (int64_t n = begin; n < end; ++n) {
        add_long(n, strip);
      }
    }
  }

  // Adds the strip's totals to those of the call.
  void flush(const M* strip, M* total) const {
    constexpr int64_t BLOCK_ROWS = 64;
    const int64_t width = problem_.width, first_row = tile_ * ROWS;
    const int64_t rows = std::min(tiles_ * ROWS, problem_.rows - first_row);
    const int64_t* row = problem_.total_row.data() + first_row;
    total += group_ * problem_.total_group + panel_ * width * problem_.total_lane;
    if (problem_.total_lane == 1) {
      for (int64_t r = 0; r < rows; ++r) {
        M* to = total + row[r];
#pragma omp simd
        for (int64_t lane = 0; lane < lanes_; ++lane) {
          to[lane] += strip[r * width + lane];
        }
      }
      return;
    }
    const bool together = consecutive(row, rows);
    for (int64_t begin = 0; begin < rows; begin += BLOCK_ROWS) {
      const int64_t end = std::min(rows, begin + BLOCK_ROWS);
      if constexpr (std::is_same_v<M, float>) {
        if (together) {
          turned<true>(strip + begin * width, width, end - begin, lanes_, total + row[begin], problem_.total_lane);
          continue;
        }
      }
      for (int64_t lane = 0; lane < lanes_; ++lane) {
        M* to = total + lane * problem_.total_lane;
        for (int64_t r = begin; r < end; ++r) {
          to[row[r]] += strip[r * width + lane];
        }
      }
    }
  }

 private:
  void add_short(int64_t first, int64_t count, M* strip) const {
    M* panel = scratch_.panel.get();
    for (int64_t n = first; n < first + count; ++n) {
      for (const Use& use : problem_.uses) {
        pack(use, n, 0, use.positions(), panel);
        panel += use.positions() * problem_.width;
      }
    }
    scratch_.walks.clear();
    for (size_t u = 0; u < problem_.uses.size(); ++u) {
      scratch_.walks.push_back(walk(u, first, 0, problem_.uses[u].positions()));
    }
    run(count, problem_.power, strip);
  }

  // A sample of more positions than a panel holds: its sums are collected in a strip of their own.
  void add_long(int64_t n, M* strip) const {
    M* sums = scratch_.sums.get();
    const int64_t size = tiles_ * ROWS * problem_.width;
    std::fill(sums, sums + size, M(0));
    for (size_t u = 0; u < problem_.uses.size(); ++u) {
      const int64_t positions = problem_.uses[u].positions();
      for (int64_t t = 0; t < positions; t += MAX_POSITIONS) {
        const int64_t count = std::min(MAX_POSITIONS, positions - t);
        pack(problem_.uses[u], n, t, count, scratch_.panel.get());
        scratch_.walks.assign(1, walk(u, n, t, count));
        run(1, Power::identity, sums);
      }
    }
    vectorised<M>([&]() FASTEWC_INLINE_LAMBDA { raise(sums, size, problem_.power); });
    for (int64_t i = 0; i < size; ++i) {
      strip[i] += sums[i];
    }
  }

  void pack(const Use& use, int64_t n, int64_t t, int64_t positions, M* to) const {
    with_elements<M>(use.g.data, use.g.dtype, [&](const auto* data) {
      const int64_t lane = group_ * problem_.lanes + panel_ * problem_.width;
      vectorised<M>([&]() FASTEWC_INLINE_LAMBDA {
        pack_panel(
            data + n * use.g.sample + lane * use.g.channel, use.g.channel, use.g_position.data() + t, positions, lanes_,
            problem_.width, problem_.one_position ? problem_.power : Power::identity, to);
      });
    });
  }

  // At the strip's first row.
  Walk<M> walk(size_t u, int64_t n, int64_t t, int64_t positions) const {
    const Use& use = problem_.uses[u];
    const int64_t step = problem_.one_position ? MAX_POSITIONS : 1; // samples of a run
    return {x_[u] + (n - first_) / step * use.sample + group_ * use.group + panel_ * use.panel, use.sample, positions,
            use.position.data() + t, use.row.data() + tile_ * ROWS};
  }

  void run(int64_t samples, Power power, M* strip) const {
    std::vector<Walk<M>>& walks = scratch_.walks;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      function_(
          {scratch_.panel.get(), walks.data(), static_cast<int64_t>(walks.size()), samples, power,
           strip + tile * ROWS * problem_.width});
      for (Walk<M>& walk : walks) {
        walk.row += ROWS;
      }
    }
  }

  const Problem& problem_;
  const std::vector<const M*>& x_;
  Scratch<M>& scratch_;
  const TileFunction<M> function_;
  const int64_t first_; // sample of x
  const int64_t group_, panel_, lanes_, tile_, tiles_;
};

// Adds samples [first, first + count), whose x is at hand, to the total.
template <typename M>
void add_samples(const Problem& problem, const std::vector<const M*>& x, int64_t first, int64_t count, M* total) {
  const int64_t work = count * problem.positions() * problem.groups * problem.panels() * problem.rows;
  const int64_t threads = work < SERIAL_WORK ? 1 : torch::stable::get_num_threads();
  const int64_t run = problem.one_position ? MAX_POSITIONS : 1, runs = (count + run - 1) / run;
  const Plan p = plan(problem, count, runs, threads);
  const int64_t strip_size = p.block_tiles * ROWS * problem.width;
  const int64_t strips = p.panels * p.blocks;
  const Buffer<M> partial(p.splits > 1 ? p.tasks * strip_size : 0);
  const auto strip_of = [&](int64_t i, Scratch<M>& scratch) {
    const int64_t tile = i % p.blocks * p.block_tiles;
    return Strip<M>(
        problem, x, scratch, first, i / p.blocks, tile, std::min(p.block_tiles, problem.tiles() - tile));
  };
  torch::stable::parallel_for(0, p.tasks, threads == 1 ? p.tasks : 1, [&](int64_t task, int64_t end) {
    Scratch<M> scratch(problem, strip_size);
    const Buffer<M> own(p.splits > 1 ? 0 : strip_size);
    for (; task < end; ++task) {
      const int64_t split = task / strips;
      const Strip<M> strip = strip_of(task % strips, scratch);
      M* sums = p.splits > 1 ? partial.get() + task * strip_size : own.get();
      std::fill(sums, sums + strip_size, M(0));
      const int64_t begin = runs * split / p.splits * run, last = std::min(count, runs * (split + 1) / p.splits * run);
      strip.add(first + begin, first + last, sums);
      if (p.splits == 1) {
        strip.flush(sums, total);
      }
    }
  });
  if (p.splits == 1) {
    return;
  }
  torch::stable::parallel_for(0, strips, 1, [&](int64_t i, int64_t end) {
    Scratch<M> none;
    for (; i < end; ++i) {
      for (int64_t split = 0; split < p.splits; ++split) {
        strip_of(i, none).flush(partial.get() + (split * strips + i) * strip_size, total);
      }
    }
  });
}

// Samples in chunks whose x stays in the second-level cache while the panels pass over it.
template <typename M>
void add_all(const Problem& problem, M* total) {
  if (problem.uses.empty()) {
    return;
  }
  const int64_t run = problem.one_position ? MAX_POSITIONS : 1;
  int64_t size = 0, copied = 0;
  for (const Use& use : problem.uses) {
    size += use.size;
    copied += use.form == Form::as_it_lies ? 0 : use.size;
  }
  const int64_t runs = (problem.samples + run - 1) / run;
  const int64_t fit = std::max<int64_t>(1, CHUNK_BYTES / std::max<int64_t>(1, size * int64_t(sizeof(M))));
  const int64_t chunks = (runs + fit - 1) / fit, chunk = (runs + chunks - 1) / chunks;
  const Buffer<M> copies(chunk * copied);
  std::vector<const M*> x(problem.uses.size());
  for (int64_t first = 0; first < problem.samples; first += chunk * run) {
    const int64_t count = std::min(chunk * run, problem.samples - first);
    M* copy = copies.get();
    for (size_t u = 0; u < x.size(); ++u) {
      const Use& use = problem.uses[u];
      if (use.form == Form::as_it_lies) {
        x[u] = static_cast<const M*>(use.x.data) + first * use.x.sample;
      } else {
        prepare(use, problem, first, count, copy);
        x[u] = copy;
        copy += chunk * use.size;
      }
    }
    add_samples(problem, x, first, count, total);
  }
}

} // namespace fastewc
