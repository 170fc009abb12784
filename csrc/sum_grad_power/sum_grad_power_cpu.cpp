// sum_grad_power on the CPU: a weight's per-sample gradients, |·|^p of each, summed; none of them ever reaches memory.
//
// fastewc/ops/sum_grad_power/reference.py is the specification, schema.py beside it has the schemas.
// Here tensors are checked and become a Problem (problem_cpu.h); strips_cpu.h cuts it up for the micro-kernel of
// tile_cpu.h, whose inputs pack_cpu.h packs.
#include "amx_cpu.h"
#include "checks.h"
#include "strips_cpu.h"

#include <string>
#include <vector>

namespace fastewc {
namespace {

Power power_of(int64_t p) {
  STD_TORCH_CHECK(p == 1 || p == 2, "sum_grad_power: wanted p 1 or 2, given ", p);
  return p == 1 ? Power::absolute : Power::square;
}

// Calls f(M{}) with the type of the arithmetic, after checks that hold for linear layers and convolutions.
template <typename F>
void dispatch(const Tensor& total, const std::vector<Tensor>& a, const std::vector<Tensor>& g, const F& f) {
  STD_TORCH_CHECK(
      a.size() == g.size(), "sum_grad_power: wanted as many tensors g as inputs, given ", g.size(), " and ", a.size());
  if (a.empty() || total.numel() == 0 || a[0].size(0) == 0) {
    return;
  }
  const ScalarType dtype = a[0].scalar_type();
  for (const auto* list : {&a, &g}) {
    for (const Tensor& t : *list) {
      STD_TORCH_CHECK(
          t.is_cpu() && t.scalar_type() == dtype, "sum_grad_power: wanted CPU tensors of one dtype, given ",
          name_of(dtype), " and ", name_of(t.scalar_type()));
    }
  }
  dispatch_floating("sum_grad_power", dtype, [&](auto zero) {
    using M = op_math_t<decltype(zero)>;
    STD_TORCH_CHECK(
        total.is_cpu() && total.scalar_type() == math_dtype<M>, "sum_grad_power: wanted a total of ",
        name_of(math_dtype<M>), " for ", name_of(dtype), ", given ", name_of(total.scalar_type()));
    f(M{});
  });
}

void check_conv(
    const Tensor& total, const Tensor& x, const Tensor& g, int64_t samples, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  bool fits = x.dim() == total.dim() && g.dim() == total.dim() && x.size(0) == samples && g.size(0) == samples &&
      x.size(1) == total.size(1) * groups && g.size(1) == total.size(0);
  for (int64_t d = 2; fits && d < total.dim(); ++d) {
    const int64_t reach = dilation[d - 2] * (total.size(d) - 1) + stride[d - 2] * (g.size(d) - 1);
    fits = stride[d - 2] >= 1 && padding[d - 2] >= 0 && dilation[d - 2] >= 1 && reach < x.size(d) + 2 * padding[d - 2];
  }
  STD_TORCH_CHECK(
      fits, "sum_grad_power: wanted x [N, C, *spatial] and g [N, O, *out] of this convolution for a total ",
      shape_of(total), ", given ", shape_of(x), " and ", shape_of(g));
}

// What one position of a plain product costs, in cycles or so as in plan(). There g and x may change places, so that
// the cheaper side gets the lanes.
template <typename M>
double cycles(int64_t positions, int64_t lanes, int64_t rows, bool dense) {
  const int64_t width = this_machine<M>().lanes;
  const double panels = static_cast<double>((lanes + width - 1) / width);
  const double padded_rows = static_cast<double>((rows + ROWS - 1) / ROWS * ROWS);
  const double passed = std::min<double>(CHUNK_BYTES / (padded_rows * sizeof(M)), positions); // until the total is read
  return panels * (padded_rows + 20 + (dense ? 10 : 25) * padded_rows / passed) + padded_rows;
}

#ifdef FASTEWC_AMX
// One side of all uses, a or g [N, T, channels].
amx::Channels channels_of(const std::vector<Tensor>& tensors, int64_t step_in_total) {
  amx::Channels side{tensors[0].size(2), step_in_total, {}};
  for (const Tensor& t : tensors) {
    const View view = View::sequence(t);
    side.sources.push_back({view.data, view.dtype, view.sample, view.channel, offsets(view.space, view.stride, ONCE)});
    side.ahead = t.size(1) <= amx::STEP ? view.sample : amx::STEP * view.stride[2];
  }
  return side;
}

// True if the matrix unit has done it.
bool added_by_amx(const Tensor& total, const std::vector<Tensor>& a, const std::vector<Tensor>& g, Power power) {
  if (isa() != Isa::amx) {
    return false;
  }
  amx::Products products{channels_of(g, total.stride(0)), channels_of(a, total.stride(1)), a[0].size(0), 0, power, false};
  for (const Tensor& t : a) {
    products.positions += t.size(1);
  }
  products.one_position = products.positions == 1;
  if (products.positions == 0 || !amx::worthwhile(products)) {
    return false;
  }
  if (products.one_position) { // the samples are its positions
    for (auto* side : {&products.rows, &products.columns}) {
      for (auto& source : side->sources) {
        source.position = offsets({{1, 1, source.position.empty() ? 0 : products.samples}}, {0, 0, source.sample}, ONCE);
        side->ahead = amx::STEP * source.sample;
      }
    }
  }
  if (total.stride(0) < total.stride(1)) {
    std::swap(products.rows, products.columns);
  }
  amx::add(products, a[0].scalar_type() == ScalarType::BFloat16, static_cast<float*>(total.mutable_data_ptr()));
  return true;
}
#endif

void add_sum_grad_power_cpu(Tensor total, std::vector<Tensor> a, std::vector<Tensor> g, int64_t p) {
  const Power power = power_of(p);
  STD_TORCH_CHECK(total.dim() == 2, "sum_grad_power: wanted a total [O, I], given ", shape_of(total));
  dispatch(total, a, g, [&]<typename M>(M) {
    check_linear(total, a, g);
#ifdef FASTEWC_AMX
    if (std::is_same_v<M, float> && added_by_amx(total, a, g, power)) {
      return;
    }
#endif
    Problem problem;
    const int64_t positions = a[0].size(0) * a[0].size(1);
    const bool exchange = cycles<M>(positions, total.size(1), total.size(0), total.stride(1) == 1) <
        cycles<M>(positions, total.size(0), total.size(1), total.stride(0) == 1);
    problem.samples = a[0].size(0);
    problem.groups = 1;
    problem.width = this_machine<M>().lanes;
    problem.power = power;
    problem.lanes = total.size(exchange ? 1 : 0);
    problem.rows = total.size(exchange ? 0 : 1);
    problem.total_lane = total.stride(exchange ? 1 : 0);
    problem.total_group = 0;
    for (int64_t r = 0; r < problem.rows; ++r) {
      problem.total_row.push_back(r * total.stride(exchange ? 0 : 1));
    }
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i].size(1) == 0) {
        continue;
      }
      Use& use = problem.uses.emplace_back();
      use.g = View::sequence(exchange ? a[i] : g[i]);
      use.x = View::sequence(exchange ? g[i] : a[i]);
      use.g_position = offsets(use.g.space, use.g.stride, ONCE);
    }
    problem.one_position = problem.positions() == 1;
    for (Use& use : problem.uses) {
      if (problem.one_position) {
        use.g_position = offsets({{1, 1, MAX_POSITIONS}}, {0, 0, use.g.sample}, ONCE);
      }
      arrange(use, problem, Form::tiles);
    }
    add_all(problem, static_cast<M*>(total.mutable_data_ptr()));
  });
}

void add_conv_grad_power_cpu(
    Tensor total, std::vector<Tensor> x, std::vector<Tensor> g, int64_t p, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const Power power = power_of(p);
  const int64_t dims = total.dim() - 2;
  STD_TORCH_CHECK(
      1 <= dims && dims <= 3,
      "sum_grad_power: wanted a total [O, C/groups, *kernel] of 1, 2 or 3 spatial dimensions, given ", shape_of(total));
  for (const auto* list : {&stride, &padding, &dilation}) {
    STD_TORCH_CHECK(
        static_cast<int64_t>(list->size()) == dims, "sum_grad_power: wanted ", dims,
        " numbers in stride, padding and dilation, given ", list->size());
  }
  STD_TORCH_CHECK(
      groups >= 1 && total.size(0) % groups == 0, "sum_grad_power: wanted outputs in ", groups, " groups, given ",
      shape_of(total));
  dispatch(total, x, g, [&]<typename M>(M) {
    Problem problem;
    const View weight = View::image(total);
    problem.window.kernel = weight.space;
    for (int64_t d = 0, to = 3 - dims; d < dims; ++d, ++to) {
      problem.window.stride[to] = stride[d];
      problem.window.padding[to] = padding[d];
      problem.window.dilation[to] = dilation[d];
    }
    problem.samples = x[0].size(0);
    problem.width = this_machine<M>().lanes;
    problem.power = power;
    // Few outputs per group would leave most lanes empty: then every lane gets an x of its own.
    problem.lanes_of_x = groups > 1 && total.size(0) / groups * 4 <= problem.width;
    problem.groups = problem.lanes_of_x ? 1 : groups;
    problem.lanes = total.size(0) / problem.groups;
    problem.rows = total.numel() / total.size(0);
    problem.total_lane = total.stride(0);
    problem.total_group = problem.lanes * total.stride(0);
    const std::vector<int64_t> kernel = offsets(weight.space, weight.stride, ONCE);
    for (int64_t c = 0; c < total.size(1); ++c) {
      for (const int64_t k : kernel) {
        problem.total_row.push_back(c * weight.channel + k);
      }
    }
    for (size_t i = 0; i < x.size(); ++i) {
      check_conv(total, x[i], g[i], x[0].size(0), stride, padding, dilation, groups);
      if (g[i].numel() == 0) {
        continue;
      }
      Use& use = problem.uses.emplace_back();
      use.g = View::image(g[i]);
      use.x = View::image(x[i]);
      use.g_position = offsets(use.g.space, use.g.stride, ONCE);
      const bool copied = padding != std::vector<int64_t>(dims, 0) || use.x.dtype != math_dtype<M>;
      arrange(use, problem, problem.lanes_of_x ? Form::lanes : copied ? Form::planes : Form::as_it_lies);
    }
    add_all(problem, static_cast<M*>(total.mutable_data_ptr()));
  });
}

bool has_matrix_unit() {
  return isa() == Isa::amx;
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CPU, m) {
  m.impl("add_sum_grad_power", TORCH_BOX(&fastewc::add_sum_grad_power_cpu));
  m.impl("add_conv_grad_power", TORCH_BOX(&fastewc::add_conv_grad_power_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fastewc, CompositeExplicitAutograd, m) {
  m.impl("has_matrix_unit", TORCH_BOX(&fastewc::has_matrix_unit));
}
