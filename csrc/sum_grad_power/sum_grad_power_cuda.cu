// sum_grad_power in CUDA: what the kernels are given, and how many blocks there are. They multiply without tensor
// cores; where Triton is installed, its kernels come first.
#include "checks.h"
#include "kernels_cuda.h"

#include <algorithm>
#include <vector>

namespace fastewc {
namespace {

constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 2; // that splitting the samples aims at
constexpr int64_t NARROW = 8; // outputs of a group below which a tile would be mostly empty

int64_t over(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The sizes and strides of t's last dimensions, as depth, height and width.
Space space_of(const Tensor& t, int64_t from, int64_t (&strides)[3]) {
  int sizes[3] = {1, 1, 1};
  for (int64_t d = t.dim() - 1, to = 2; d >= from; --d, --to) {
    sizes[to] = static_cast<int>(t.size(d));
    strides[to] = t.stride(d);
  }
  return {sizes[0], sizes[1], sizes[2]};
}

// x [N, C, *in] and g [N, O, *out], whichever dimension the channels are in memory.
Use use_of(const Tensor& x, const Tensor& g) {
  int64_t of_x[3] = {}, of_g[3] = {};
  const Space in = space_of(x, 2, of_x), out = space_of(g, 2, of_g);
  return {x.const_data_ptr(), g.const_data_ptr(), x.stride(0), x.stride(1), of_x[0], of_x[1], of_x[2],
          g.stride(0), g.stride(1), of_g[0], of_g[1], of_g[2], in, out};
}

// What all uses have in common. The weight is [O, C, *kernel].
Problem problem_of(const Tensor& total, int64_t p, int64_t groups) {
  Problem problem = {};
  int64_t strides[3] = {};
  problem.kernel = space_of(total, 2, strides);
  problem.total = total.mutable_data_ptr();
  problem.total_o = total.stride(0);
  problem.total_c = total.stride(1);
  problem.total_d = strides[0];
  problem.total_h = strides[1];
  problem.total_w = strides[2];
  problem.C = total.size(1);
  problem.I = problem.C * problem.kernel.volume();
  problem.O = static_cast<int>(total.size(0) / groups);
  problem.groups = static_cast<int>(groups);
  problem.p = static_cast<int>(p);
  std::fill_n(problem.stride, 3, 1);
  std::fill_n(problem.dilation, 3, 1);
  return problem;
}

template <typename T>
void launch(const Place& place, Problem problem, const Tensor& total) {
  using M = op_math_t<T>;
  const bool narrow = problem.groups > 1 && problem.O < NARROW;
  const int64_t elements = int64_t(problem.groups) * problem.O * problem.I;
  const int64_t blocks =
      narrow ? over(elements, THREADS / WARP) : over(problem.O, SIDE) * over(problem.I, SIDE) * problem.groups;
  const int64_t unit = problem.single ? DEPTH : 1; // so that only the last split has an incomplete tile of positions
  const int64_t splits = std::clamp<int64_t>(
      BLOCKS_PER_MULTIPROCESSOR * place.multiprocessors() / blocks, 1, over(problem.units, unit));
  problem.share = over(over(problem.units, unit), splits) * unit;
  problem.splits = static_cast<int>(over(problem.units, problem.share));
  Problem own = problem;
  Tensor parts;
  if (problem.splits > 1) {
    parts = torch::stable::empty({problem.splits, elements}, total.scalar_type(), std::nullopt, total.device());
    own.total = parts.mutable_data_ptr();
    problem.parts = own.total;
    own.total_split = elements;
    own.total_o = problem.I;
    own.total_c = problem.kernel.volume();
    own.total_d = int64_t(problem.kernel.h) * problem.kernel.w;
    own.total_h = problem.kernel.w;
    own.total_w = 1;
  }
  if (narrow) {
    place.launch(narrow_kernel<T>, over(elements * problem.splits, THREADS / WARP), own);
  } else {
    place.launch(tile_kernel<T>, blocks * problem.splits, own);
  }
  if (problem.splits > 1) {
    place.launch(gather_kernel<M>, over(elements, THREADS), problem);
  }
}

void run(Problem problem, const Tensor& total, const std::vector<Use>& uses, ScalarType dtype) {
  if (uses.empty() || problem.units == 0 || total.numel() == 0) {
    return;
  }
  const Place place(total);
  const int64_t bytes = static_cast<int64_t>(uses.size() * sizeof(Use));
  const Tensor table = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, total.device());
  problem.uses = static_cast<const Use*>(table.const_data_ptr());
  problem.uses_count = static_cast<int>(uses.size());
  problem.along_positions = uses[0].x_c != 1;
  for (size_t at = 0; at < uses.size(); at += Upload::CAPACITY) {
    Upload upload = {};
    upload.to = static_cast<Use*>(table.mutable_data_ptr()) + at;
    upload.count = static_cast<int>(std::min<size_t>(Upload::CAPACITY, uses.size() - at));
    std::copy_n(uses.begin() + at, upload.count, upload.uses);
    place.launch(upload_kernel, 1, upload);
  }
  dispatch_floating("sum_grad_power", dtype, [&](auto zero) { launch<decltype(zero)>(place, problem, total); });
}

// Checks what linear layers and convolutions have in common; the dtype of the uses.
ScalarType check(const Tensor& total, const std::vector<Tensor>& x, const std::vector<Tensor>& g, int64_t p) {
  STD_TORCH_CHECK(p == 1 || p == 2, "sum_grad_power: wanted p of 1 or 2, given ", p);
  STD_TORCH_CHECK(
      x.size() == g.size(), "sum_grad_power: wanted as many g as inputs, given ", g.size(), " for ", x.size());
  const ScalarType dtype = x.empty() ? ScalarType::Float : dtype_of("sum_grad_power", x[0]);
  for (size_t i = 0; i < x.size(); ++i) {
    for (const Tensor& t : {x[i], g[i]}) {
      STD_TORCH_CHECK(
          t.scalar_type() == dtype, "sum_grad_power: wanted segments of one dtype, ", name_of(dtype), ", given ",
          name_of(t.scalar_type()));
      STD_TORCH_CHECK(
          t.is_cuda() && t.get_device_index() == total.get_device_index(),
          "sum_grad_power: wanted segments on the total's device");
    }
  }
  const ScalarType wanted = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      x.empty() || total.scalar_type() == wanted, "sum_grad_power: wanted a ", name_of(wanted), " total, given ",
      name_of(total.scalar_type()));
  return dtype;
}

void add_sum_grad_power_cuda(Tensor total, std::vector<Tensor> a, std::vector<Tensor> g, int64_t p) {
  const ScalarType dtype = check(total, a, g, p);
  STD_TORCH_CHECK(total.dim() == 2, "sum_grad_power: wanted a total [O, I], given ", shape_of(total));
  check_linear(total, a, g);
  Problem problem = problem_of(total, p, 1);
  std::vector<Use> uses;
  int64_t positions = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].size(1) > 0) {
      uses.push_back(use_of(torch::stable::transpose(a[i], 1, 2), torch::stable::transpose(g[i], 1, 2)));
      positions += a[i].size(1);
    }
  }
  problem.units = a.empty() ? 0 : a[0].size(0);
  problem.single = positions == 1;
  if (problem.single) {
    Use& use = uses[0];
    use.x_w = use.x_n;
    use.g_w = use.g_n;
    use.in.w = use.out.w = static_cast<int>(problem.units);
  }
  run(problem, total, uses, dtype);
}

void add_conv_grad_power_cuda(
    Tensor total, std::vector<Tensor> x, std::vector<Tensor> g, int64_t p, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const ScalarType dtype = check(total, x, g, p);
  const int64_t dims = total.dim() - 2;
  STD_TORCH_CHECK(
      dims >= 1 && dims <= 3 && groups >= 1 && total.size(0) % groups == 0 && int64_t(stride.size()) == dims &&
          int64_t(padding.size()) == dims && int64_t(dilation.size()) == dims,
      "sum_grad_power: wanted a total [O, C/groups, *kernel] of 1, 2 or 3 spatial dimensions, and as many numbers in "
      "stride, padding and dilation, given ", shape_of(total), " for ", groups, " groups");
  Problem problem = problem_of(total, p, groups);
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(
        stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1,
        "sum_grad_power: wanted stride and dilation of at least 1 and padding of at least 0");
    problem.stride[3 - dims + d] = static_cast<int>(stride[d]);
    problem.padding[3 - dims + d] = static_cast<int>(padding[d]);
    problem.dilation[3 - dims + d] = static_cast<int>(dilation[d]);
  }
  std::vector<Use> uses;
  for (size_t i = 0; i < x.size(); ++i) {
    bool fits = x[i].dim() == total.dim() && g[i].dim() == total.dim() && x[i].size(0) == x[0].size(0) &&
        g[i].size(0) == x[0].size(0) && x[i].size(1) == problem.C * groups && g[i].size(1) == total.size(0);
    for (int64_t d = 2; fits && d < total.dim(); ++d) {
      const int64_t last = (g[i].size(d) - 1) * stride[d - 2] + (total.size(d) - 1) * dilation[d - 2];
      fits = last < x[i].size(d) + 2 * padding[d - 2];
    }
    STD_TORCH_CHECK(
        fits, "sum_grad_power: wanted x [N, C, *spatial] and g [N, O, *out] of this convolution for a total ",
        shape_of(total), ", given ", shape_of(x[i]), " and ", shape_of(g[i]));
    if (g[i].numel() > 0) {
      uses.push_back(use_of(x[i], g[i]));
    }
  }
  problem.units = x.empty() ? 0 : x[0].size(0);
  run(problem, total, uses, dtype);
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CUDA, m) {
  m.impl("add_sum_grad_power", TORCH_BOX(&fastewc::add_sum_grad_power_cuda));
  m.impl("add_conv_grad_power", TORCH_BOX(&fastewc::add_conv_grad_power_cuda));
}
