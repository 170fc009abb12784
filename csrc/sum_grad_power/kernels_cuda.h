// The kernels of sum_grad_power: Σ_n |Σ_t g a|^p of linear layers and convolutions; a block to a 64 × 64 tile of the
// weight, or a warp to an element.
//
// Everything is a convolution of depth, height and width: a linear layer has one kernel position and T columns. At T
// = 1 the powers are taken first and the samples stand in for positions. Sums are formed with fused multiply-adds in float
// (double for double) by one thread each, in an order that is always the same.
#pragma once

#include "../multi_tensor_cuda.h"

#include <cmath>
#include <cstring>

namespace fastewc {
namespace {

constexpr int SIDE = 64; // of a tile
constexpr int DEPTH = 16; // positions in shared memory
constexpr int QUAD = 4; // outputs and inputs of a thread
constexpr int LOADS = SIDE * DEPTH / THREADS; // of a thread, of either side

struct Space {
  int d = 1, h = 1, w = 1;

  __host__ __device__ int64_t volume() const {
    return int64_t(d) * h * w;
  }
};

// One use of the weight: x [N, channels, in], g [N, outputs, out], and their strides.
struct Use {
  const void *x, *g;
  int64_t x_n, x_c, x_d, x_h, x_w, g_n, g_o, g_d, g_h, g_w;
  Space in, out;
};

struct Problem {
  const Use* uses; // on the device
  void* total; // or the parts of the splits
  const void* parts; // to be gathered
  int64_t total_split, total_o, total_c, total_d, total_h, total_w; // strides
  int64_t share, units; // samples of a split and of all; positions where `single`
  int64_t C, I; // of a group
  int uses_count, O, groups, splits, p;
  int stride[3], padding[3], dilation[3];
  Space kernel;
  bool single; // T = 1, samples as positions
  bool along_positions; // neighbouring threads load neighbouring positions, not channels
};

template <typename M>
struct alignas(4 * sizeof(M)) Quad {
  M v[QUAD];
};

// An element of the weight's row: its channel and where the kernel is.
struct Entry {
  int64_t c;
  int d, h, w;

  __device__ Entry(const Problem& args, int64_t i) : c(i / args.kernel.volume()) {
    const int k = static_cast<int>(i - c * args.kernel.volume());
    d = k / (args.kernel.h * args.kernel.w);
    h = k / args.kernel.w % args.kernel.h;
    w = k % args.kernel.w;
  }

  __device__ int64_t in_total(const Problem& args) const {
    return c * args.total_c + d * args.total_d + h * args.total_h + w * args.total_w;
  }
};

// A position of the output.
__device__ __forceinline__ Space position(const Space& out, int64_t t) {
  if (out.d == 1 && out.h == 1) {
    return {0, 0, static_cast<int>(t)};
  }
  const int hw = out.h * out.w, rest = static_cast<int>(t % hw);
  return {static_cast<int>(t / hw), rest / out.w, rest % out.w};
}

// A pointer that was itself read from memory might point anywhere, says the compiler; this one is global.
template <typename T>
__device__ __forceinline__ T global(const T* from) {
#ifdef __CUDA_ARCH__
  using Bits = std::conditional_t<sizeof(T) == 8, double, std::conditional_t<sizeof(T) == 4, float, unsigned short>>;
  const Bits bits = __ldg(reinterpret_cast<const Bits*>(from));
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
#else
  return *from;
#endif
}

// What x and g hold at a position; 0 in the padding.
template <typename T>
__device__ __forceinline__ T x_at(const Problem& args, const Use& use, const T* x, const Space& t, const Entry& i) {
  const int d = t.d * args.stride[0] - args.padding[0] + i.d * args.dilation[0];
  const int h = t.h * args.stride[1] - args.padding[1] + i.h * args.dilation[1];
  const int w = t.w * args.stride[2] - args.padding[2] + i.w * args.dilation[2];
  if (d < 0 || d >= use.in.d || h < 0 || h >= use.in.h || w < 0 || w >= use.in.w) {
    return T(0);
  }
  return global(x + i.c * use.x_c + d * use.x_d + h * use.x_h + w * use.x_w);
}

template <typename T>
__device__ __forceinline__ T g_at(const Use& use, const T* g, const Space& t, int64_t o) {
  return global(g + o * use.g_o + t.d * use.g_d + t.h * use.g_h + t.w * use.g_w);
}

template <typename M>
__device__ __forceinline__ M power(M x, int p) {
  return p == 1 ? std::fabs(x) : x * x;
}

// Adds the products of DEPTH positions to a thread's tile.
template <typename M>
__device__ __forceinline__ void multiply(
    const Quad<M> (&g_tile)[DEPTH][SIDE / QUAD + 1], const Quad<M> (&x_tile)[DEPTH][SIDE / QUAD + 1], int row,
    int column, M (&sum)[QUAD][QUAD]) {
#pragma unroll
  for (int t = 0; t < DEPTH; ++t) {
    const Quad<M> g = g_tile[t][row], x = x_tile[t][column];
#pragma unroll
    for (int o = 0; o < QUAD; ++o) {
#pragma unroll
      for (int i = 0; i < QUAD; ++i) {
        sum[o][i] = std::fma(g.v[o], x.v[i], sum[o][i]); // by itself nothing is contracted (--fmad=false)
      }
    }
  }
}

// Two blocks of float fit into a multiprocessor's registers; of double one would spill if it left room for another.
template <typename T>
constexpr int BLOCKS = std::is_same_v<T, double> ? 1 : 2;

template <typename T>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>) tile_kernel(const __grid_constant__ Problem args) {
  using M = op_math_t<T>;
  __shared__ Quad<M> g_tile[DEPTH][SIDE / QUAD + 1], x_tile[DEPTH][SIDE / QUAD + 1];
  const int64_t tiles_o = (args.O + SIDE - 1) / SIDE, tiles_i = (args.I + SIDE - 1) / SIDE;
  const int64_t block = blockIdx.x;
  const int64_t first_o = block % tiles_o * SIDE, first_i = block / tiles_o % tiles_i * SIDE;
  const int64_t group = block / (tiles_o * tiles_i) % args.groups, split = block / (tiles_o * tiles_i * args.groups);
  const int thread = static_cast<int>(threadIdx.x), row = thread / (SIDE / QUAD), column = thread % (SIDE / QUAD);
  const int64_t begin = split * args.share, end = min(begin + args.share, args.units);
  const int64_t last_n = args.single ? 1 : end;

  M total[QUAD][QUAD] = {};
  for (int64_t n = args.single ? 0 : begin; n < last_n; ++n) {
    M sum[QUAD][QUAD] = {};
    for (int u = 0; u < args.uses_count; ++u) {
      const Use& use = args.uses[u];
      const T* x = static_cast<const T*>(use.x) + n * use.x_n + group * args.C * use.x_c;
      const T* g = static_cast<const T*>(use.g) + n * use.g_n + group * args.O * use.g_o;
      const int64_t last_t = args.single ? end : use.out.volume();
      for (int64_t t = args.single ? begin : 0; t < last_t; t += DEPTH) {
        __syncthreads(); // the tiles of the positions before have been read
        for (int load = 0; load < LOADS; ++load) {
          const int at = thread + load * THREADS;
          const int down = args.along_positions ? at % DEPTH : at / SIDE;
          const int across = args.along_positions ? at / DEPTH : at % SIDE;
          M from_g = 0, from_x = 0;
          if (t + down < last_t) {
            const Space where = position(use.out, t + down);
            if (first_o + across < args.O) {
              from_g = static_cast<M>(g_at(use, g, where, first_o + across));
            }
            if (first_i + across < args.I) {
              from_x = static_cast<M>(x_at(args, use, x, where, Entry(args, first_i + across)));
            }
          }
          g_tile[down][across / QUAD].v[across % QUAD] = args.single ? power(from_g, args.p) : from_g;
          x_tile[down][across / QUAD].v[across % QUAD] = args.single ? power(from_x, args.p) : from_x;
        }
        __syncthreads();
        multiply(g_tile, x_tile, row, column, sum);
      }
    }
#pragma unroll
    for (int o = 0; o < QUAD; ++o) {
#pragma unroll
      for (int i = 0; i < QUAD; ++i) {
        total[o][i] += args.single ? sum[o][i] : power(sum[o][i], args.p);
      }
    }
  }

  M* out = static_cast<M*>(args.total) + split * args.total_split + group * args.O * args.total_o;
  for (int i = 0; i < QUAD; ++i) {
    const int64_t own_i = first_i + column * QUAD + i;
    const int64_t at = Entry(args, own_i).in_total(args);
#pragma unroll
    for (int o = 0; o < QUAD; ++o) {
      const int64_t own_o = first_o + row * QUAD + o;
      if (own_o < args.O && own_i < args.I) {
        M& element = out[own_o * args.total_o + at];
        element = args.splits == 1 ? element + total[o][i] : total[o][i];
      }
    }
  }
}

// Groups of few outputs, such as a depthwise convolution's: a warp to each element of the weight.
template <typename T>
__global__ void __launch_bounds__(THREADS) narrow_kernel(const __grid_constant__ Problem args) {
  using M = op_math_t<T>;
  const int64_t elements = int64_t(args.groups) * args.O * args.I;
  const int64_t warp = int64_t(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
  const int64_t split = warp / elements, element = warp % elements;
  const bool real = split < args.splits; // without an element, a warp only takes part in the shuffles
  const int64_t o = element / args.I, group = o / args.O; // o among those of all groups
  const Entry i(args, element % args.I);
  M total = 0;
  // A warp that has fewer samples than others goes with them, so that all meet at the shuffles.
  for (int64_t n = split * args.share, left = args.share; left > 0; ++n, --left) {
    M sum = 0;
    for (int u = 0; u < args.uses_count; ++u) {
      const Use& use = args.uses[u];
      const T* x = static_cast<const T*>(use.x) + n * use.x_n + group * args.C * use.x_c;
      const T* g = static_cast<const T*>(use.g) + n * use.g_n;
      const int64_t T_own = real && n < args.units ? use.out.volume() : 0;
      for (int64_t t = threadIdx.x % WARP; t < T_own; t += WARP) {
        const Space where = position(use.out, t);
        sum = std::fma(static_cast<M>(g_at(use, g, where, o)), static_cast<M>(x_at(args, use, x, where, i)), sum);
      }
    }
    double whole = sum;
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
      whole += __shfl_xor_sync(0xffffffffu, whole, distance);
    }
    total += power(static_cast<M>(whole), args.p);
  }
  if (real && threadIdx.x % WARP == 0) {
    M& to = static_cast<M*>(args.total)[split * args.total_split + o * args.total_o + i.in_total(args)];
    to = args.splits == 1 ? to + total : total;
  }
}

// As many uses as go into the arguments of a kernel, which puts them where the kernels read them.
struct Upload {
  static constexpr int CAPACITY = (ARGUMENT_BYTES - 64) / sizeof(Use);
  Use uses[CAPACITY];
  Use* to;
  int count;
};

__global__ void __launch_bounds__(THREADS) upload_kernel(const __grid_constant__ Upload args) {
  for (int i = static_cast<int>(threadIdx.x); i < args.count; i += THREADS) {
    args.to[i] = args.uses[i];
  }
}

// Adds the parts of all splits to the total, in order.
template <typename M>
__global__ void __launch_bounds__(THREADS) gather_kernel(const __grid_constant__ Problem args) {
  const int64_t element = int64_t(blockIdx.x) * THREADS + threadIdx.x, size = int64_t(args.groups) * args.O * args.I;
  if (element >= size) {
    return;
  }
  M sum = 0;
  for (int split = 0; split < args.splits; ++split) {
    sum += static_cast<const M*>(args.parts)[split * size + element];
  }
  static_cast<M*>(args.total)[element / args.I * args.total_o + Entry(args, element % args.I).in_total(args)] += sum;
}

} // namespace
} // namespace fastewc
