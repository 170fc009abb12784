// CUDA C++ as plain C++: as much of the language and the runtime as the kernels of csrc use, on CPU tensors.
//
// A block's threads are fibers that take turns at every barrier; blocks follow one another. What a GPU adds (memory
// models, limits on registers and shared memory) is not here; what a kernel computes is.
#pragma once

// The names below are macros, so what uses them otherwise has to be read before.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

// The kernels are registered for the CPU, and take CPU tensors for those of their device.
#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
} // namespace torch::stable::accelerator

using std::max;
using std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T old = *to;
  *to += value;
  return old;
}

// ---- threads ----

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

// The fibers of one block. A kernel calls `wait` wherever all of its threads have to arrive.
class Fibers {
 public:
  static Fibers& get() {
    static Fibers fibers;
    return fibers;
  }

  void run(unsigned count, const std::function<void()>& body) {
    body_ = &body;
    threads_.resize(count);
    for (Thread& thread : threads_) {
      if (!thread.stack) {
        thread.stack.reset(new char[STACK]);
      }
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = STACK;
      thread.context.uc_link = &scheduler_;
      thread.done = false;
      makecontext(&thread.context, &Fibers::enter, 0);
    }
    for (bool working = true; working;) {
      working = false;
      for (unsigned i = 0; i < count; ++i) {
        if (!threads_[i].done) {
          threadIdx.x = i;
          swapcontext(&scheduler_, &threads_[i].context);
          working = true;
        }
      }
    }
  }

  void wait() {
    swapcontext(&threads_[threadIdx.x].context, &scheduler_);
  }

 private:
  static constexpr size_t STACK = 64 * 1024;
  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
  };

  static void enter() {
    (*get().body_)();
    get().threads_[threadIdx.x].done = true;
  }

  ucontext_t scheduler_;
  std::vector<Thread> threads_;
  const std::function<void()>* body_ = nullptr;
};

inline void __syncthreads() {
  Fibers::get().wait();
}

// All threads of the block take part, as in the kernels of csrc.
inline double __shfl_xor_sync(unsigned, double value, int distance) {
  static double values[1024];
  values[threadIdx.x] = value;
  __syncthreads();
  const double other = values[threadIdx.x ^ static_cast<unsigned>(distance)];
  __syncthreads();
  return other;
}

// ---- runtime ----

using cudaError_t = int;
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
constexpr int cudaDevAttrMultiProcessorCount = 16;

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(EXPR) ((void)(EXPR))

inline cudaError_t cudaSetDevice(int) {
  return 0;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 1; // so that tensors of some 10,000 elements already make chunks of several tiles
  return 0;
}

inline int aoti_torch_get_current_cuda_stream(int, void**) {
  return 0;
}

template <typename Arguments, typename Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments), const Given& given) {
  const Arguments arguments = given;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(arguments); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    Fibers::get().run(blockDim.x, body);
  }
  return 0;
}
