// What the kernels of every device ask of their inputs.
#pragma once

#include "../common.h"

#include <vector>

namespace fastewc {

inline void check_linear(const Tensor& total, const std::vector<Tensor>& a, const std::vector<Tensor>& g) {
  for (size_t i = 0; i < a.size(); ++i) {
    STD_TORCH_CHECK(
        a[i].dim() == 3 && g[i].dim() == 3 && a[i].size(0) == a[0].size(0) && g[i].size(0) == a[0].size(0) &&
            a[i].size(1) == g[i].size(1) && a[i].size(2) == total.size(1) && g[i].size(2) == total.size(0),
        "sum_grad_power: wanted a [N, T, I] and g [N, T, O] for a total [O, I], given ", shape_of(a[i]), " and ",
        shape_of(g[i]), " for ", shape_of(total));
  }
}

} // namespace fastewc
