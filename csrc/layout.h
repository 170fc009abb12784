// How the elements of a tensor lie in memory.
#pragma once

#include "common.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace fastewc {

inline bool same_shape(const Tensor& a, const Tensor& b) { // torch 2.11 has no == for sizes
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto x = a.strides(), y = b.strides(), sizes = a.sizes();
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (sizes[d] > 1 && x[d] != y[d]) {
      return false;
    }
  }
  return true;
}

// True if the elements fill their memory without gaps or overlaps, in any order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) {
    return true;
  }
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dims; // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (sizes[d] > 1) {
      dims.emplace_back(strides[d], sizes[d]);
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Calls f(offset) with the place in memory of each element, in the order of a contiguous tensor.
template <typename F>
void for_each_offset(const Tensor& t, const F& f) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<int64_t> index(t.dim(), 0);
  int64_t offset = 0;
  for (int64_t left = t.numel(); left > 0; --left) {
    f(offset);
    for (int64_t d = t.dim() - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) {
        break;
      }
      offset -= strides[d] * sizes[d];
      index[d] = 0;
    }
  }
}

} // namespace fastewc
