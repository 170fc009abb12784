// ewc_step in CUDA: SGD, Adam and AdamW with the penalty inside, one launch for some 40 tensors.
//
// fastewc/ops/ewc_step/reference.py is the specification; the schema is in fastewc/ops/ewc_step/schema.py. A kernel is
// compiled for each kind of optimizer and for float and double arithmetic; everything else, dtypes included, is a
// branch that all threads take alike, which a kernel that waits for memory does not feel.
#include "../multi_tensor_cuda.h"
#include "lanes.h"

#include <optional>
#include <string>
#include <vector>

namespace fastewc {
namespace {

enum List { PARAM, REMAINDER, GRAD, MOMENT, SQUARE, LARGEST, IMPORTANCE, ANCHOR, PATH, LISTS };

using StepSegment = Segment<LISTS>;

template <typename M>
struct StepArguments {
  Table<StepSegment> table;
  Rule<M> rule;
  bool maximize;
  DeviceScalar clip_coef, grad_scale, found_inf;
  const double* live_scalars; // or null: the rule's own
  const double2* corrections; // [n]: α/(1 − β₁ᵗ), 1/√(1 − β₂ᵗ)
};

// 1/scale as GradScaler forms it: in float64, rounded to float32. For a float32 scale one float32 division is the same.
__device__ float inverse_of(const DeviceScalar& scale) {
  const double value = scale.read(1);
  return scale.dtype == ScalarType::Float ? 1.0f / static_cast<float>(value) : static_cast<float>(1 / value);
}

// Adam with codes does not fit into the 64 registers of four blocks; three still have more loads on their way than the
// memory needs.
template <typename M, bool ADAM>
__global__ void __launch_bounds__(THREADS, sizeof(M) == 4 && !ADAM ? 4 : 3) ewc_step_kernel(
    const __grid_constant__ StepArguments<M> args) {
  constexpr int N = VECTOR<M>;
  if (args.found_inf.read(0) != 0) {
    return;
  }
  Rule<M> rule = args.rule;
  if (args.live_scalars != nullptr) {
    rule.set(args.live_scalars);
  }
  const StepSegment& segment = args.table.segment_of(blockIdx.x);
  const auto has = [&](List list) { return segment.data[list] != nullptr; };
  Live<M> live;
  live.task_factor = static_cast<M>(args.maximize ? -inverse_of(args.grad_scale) : inverse_of(args.grad_scale));
  live.clip = static_cast<M>(args.clip_coef.read(1));
  if constexpr (ADAM) {
    const double2 correction = args.corrections[segment.index];
    live.step_size = static_cast<M>(correction.x);
    live.inverse_root = static_cast<M>(correction.y);
  }
  const bool pulls = has(IMPORTANCE) && (rule.variant == Variant::plain || rule.variant == Variant::stabilized);
  const bool heavy = !ADAM && has(MOMENT) && rule.momentum != M(0);

  const Chunk chunk(args.table, segment, blockIdx.x);
  for (int at = 0; at < chunk.size; at += Tile<N>::SIZE) {
    const Tile<N> tile(chunk, at);
    Loaded<M, N> stored[LISTS];
    LoadedWeight<M, N> weight;
    LoadedImportance<M, N> importance;
    const auto load = [&](int list) { stored[list].load(segment, list, tile); };
    const auto convert = [&](int list, M(&values)[N]) { stored[list].convert(segment.dtypes[list], values); };
    M w[N], task[N], g[N], w_new[N], omega[N], anchor[N], path[N];
    weight.load(segment, PARAM, REMAINDER, tile);
    load(GRAD);
    if (ADAM || (heavy && !rule.first)) {
      load(MOMENT);
    }
    if constexpr (ADAM) {
      load(SQUARE);
    }
    if (has(IMPORTANCE)) {
      importance.load(segment, IMPORTANCE, tile);
      load(ANCHOR);
    }
    if (has(PATH)) {
      fastewc::load(segment.data[PATH], tile, path);
    }

    weight.convert(segment, PARAM, REMAINDER, w);
    convert(GRAD, task);
    scale(task, live.task_factor, task);
    scale(task, live.clip, g);
    if (has(IMPORTANCE)) {
      importance.convert(segment, IMPORTANCE, tile, omega);
      convert(ANCHOR, anchor);
    }
    if (pulls) {
      M pull[N];
      pull_of(rule, w, omega, anchor, pull);
      add_pull(rule, live.clip, task, pull, g);
      if (rule.regularized_path) {
        add(pull, M(1), task);
      }
    }
    if (!rule.decoupled && rule.decay != M(0)) {
      add(w, rule.decay, g);
    }
    if constexpr (ADAM) {
      M m[N], v[N];
      convert(MOMENT, m);
      convert(SQUARE, v);
      update_moments(rule, g, m, v);
      store(segment, MOMENT, tile, m);
      store(segment, SQUARE, tile, v);
      if (has(LARGEST)) {
        M largest[N];
        load(LARGEST);
        convert(LARGEST, largest);
        keep_largest(largest, v);
        store(segment, LARGEST, tile, v);
      }
      adam_update(rule, live, w, m, v, w_new);
    } else if (heavy) {
      M b[N];
      convert(MOMENT, b);
      heavy_ball_update(rule, w, g, b, w_new);
      store(segment, MOMENT, tile, b);
    } else {
      sgd_update(rule, w, g, w_new);
    }
    if (has(IMPORTANCE) && !pulls) {
      hold_back(rule, w, omega, anchor, w_new);
    }
    store_weight(segment, PARAM, REMAINDER, tile, w_new);
    if (has(PATH)) {
      if (!has(REMAINDER)) {
        round_as(segment.dtypes[PARAM], w_new); // w⁺ as it is stored
      }
      add_to_path(task, w, w_new, path);
      store(segment, PATH, tile, path);
    }
  }
}

// ---- Adam's counters ----

constexpr int COUNTERS = 384; // a launch's
struct Counters {
  void* steps[COUNTERS];
  bool wide[COUNTERS]; // float64, else float32
  int count;
  DeviceScalar found_inf;
  const double* live_scalars;
  double lr, beta1, beta2;
  double2* corrections;
};

// A number as the sum of two doubles.
struct Pair {
  double high, low;
};

__device__ Pair times(Pair a, Pair b) {
  const double product = a.high * b.high;
  const double lacking = fma(a.high, b.high, -product) + (a.high * b.low + a.low * b.high);
  const double high = product + lacking;
  return {high, lacking - (high - product)};
}

// βᵗ by squaring, rounded once, as the host's pow: 1 − βᵗ of the first steps cancels all but a few digits of an error.
__device__ double power(double beta, double t) {
  Pair result = {1, 0}, base = {beta, 0};
  for (auto bits = static_cast<uint64_t>(t); bits != 0; bits /= 2) {
    if (bits % 2 == 1) {
      result = times(result, base);
    }
    base = times(base, base);
  }
  return result.high;
}

// Advances every counter t and forms the corrections in float64.
__global__ void __launch_bounds__(THREADS) advance_kernel(const __grid_constant__ Counters args) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= args.count || args.found_inf.read(0) != 0) {
    return;
  }
  double t;
  if (args.wide[i]) {
    t = *static_cast<double*>(args.steps[i]) += 1;
  } else {
    t = *static_cast<float*>(args.steps[i]) += 1;
  }
  const double* live = args.live_scalars;
  const double lr = live ? live[0] : args.lr, beta1 = live ? live[3] : args.beta1, beta2 = live ? live[4] : args.beta2;
  args.corrections[i] = {lr / (1 - power(beta1, t)), 1 / sqrt(1 - power(beta2, t))};
}

Tensor advance(
    const Place& place, const std::vector<Tensor>& steps, const std::vector<double>& scalars,
    const double* live_scalars, const DeviceScalar& found_inf) {
  const int64_t count = static_cast<int64_t>(steps.size());
  const Tensor corrections = torch::stable::new_empty(steps[0], {count, 2}, ScalarType::Double);
  double2* to = static_cast<double2*>(corrections.mutable_data_ptr());
  for (size_t begin = 0; begin < steps.size(); begin += COUNTERS) {
    Counters args = {.found_inf = found_inf, .live_scalars = live_scalars, .corrections = to + begin};
    if (live_scalars == nullptr) {
      args.lr = scalars[0], args.beta1 = scalars[3], args.beta2 = scalars[4];
    }
    args.count = static_cast<int>(std::min<size_t>(COUNTERS, steps.size() - begin));
    for (int i = 0; i < args.count; ++i) {
      const Tensor& step = steps[begin + i];
      const ScalarType dtype = dtype_of("ewc_step", step);
      STD_TORCH_CHECK(
          step.numel() == 1 && place.has(step) && (dtype == ScalarType::Float || dtype == ScalarType::Double),
          "ewc_step: wanted steps of one float32 or float64 number on the device of the parameters, given ",
          shape_of(step), " of ", name_of(dtype), place.has(step) ? "" : " elsewhere");
      args.steps[i] = step.mutable_data_ptr();
      args.wide[i] = dtype == ScalarType::Double;
    }
    place.launch(advance_kernel, (args.count + THREADS - 1) / THREADS, args);
  }
  return corrections;
}

// The segments of all parameters that have elements; `lists` in the order of List, empty ones are absent.
std::vector<StepSegment> segments_of(Streams& streams, const std::vector<Tensor>* const (&lists)[LISTS]) {
  std::vector<StepSegment> segments;
  const std::vector<Tensor>& params = *lists[PARAM];
  for (size_t i = 0; i < params.size(); ++i) {
    StepSegment segment;
    segment.size = params[i].numel();
    segment.index = static_cast<int>(i);
    const bool wide = dtype_of("ewc_step", params[i]) == ScalarType::Double;
    streams.begin(params[i], wide ? ScalarType::Double : ScalarType::Float);
    for (int list = 0; list < LISTS; ++list) {
      if (lists[list]->empty()) {
        continue;
      }
      if (list == IMPORTANCE) {
        streams.put_importance(segment, list, (*lists[list])[i], i);
      } else if (list == REMAINDER) {
        streams.put_remainder(segment, list, (*lists[list])[i], PARAM);
      } else {
        streams.put(segment, list, (*lists[list])[i], list != GRAD && list != ANCHOR, list == PATH);
      }
    }
    if (segment.size > 0) {
      segments.push_back(segment);
    }
  }
  return segments;
}

// Steps the segments whose arithmetic is in M.
template <typename M>
void launch_steps(const Place& place, bool adam, const std::vector<StepSegment>& segments, StepArguments<M> args) {
  std::vector<StepSegment> own;
  std::copy_if(segments.begin(), segments.end(), std::back_inserter(own), [](const StepSegment& segment) {
    return std::is_same_v<M, double> == (segment.dtypes[PARAM] == ScalarType::Double);
  });
  const int chunk_size = place.chunk_size(total_size(segments), Tile<VECTOR<M>>::SIZE);
  for_each_table(own, chunk_size, [&](const Table<StepSegment>& table, int64_t chunks) {
    args.table = table;
    place.launch(adam ? ewc_step_kernel<M, true> : ewc_step_kernel<M, false>, chunks, args);
  });
}

void ewc_step_cuda(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffers,
    std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs,
    std::vector<Tensor> steps, std::vector<Tensor> importances, std::vector<Tensor> scales,
    std::vector<Tensor> anchors, std::vector<Tensor> path_integrals, std::vector<Tensor> remainders,
    std::optional<Tensor> clip_coef, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
    std::optional<Tensor> live_scalars, std::vector<double> scalars, std::string kind, std::string variant,
    bool maximize, bool nesterov, bool first, bool amsgrad, bool decoupled_weight_decay, bool clip_penalty,
    bool regularized_path) {
  const size_t count = params.size();
  if (count == 0) {
    return;
  }
  const bool adam = is_adam(kind);
  const std::vector<Tensor> absent;
  const std::vector<Tensor>* lists[LISTS];
  lists[PARAM] = &params;
  lists[REMAINDER] = &remainders;
  lists[GRAD] = &grads;
  lists[MOMENT] = adam ? &exp_avgs : &momentum_buffers;
  lists[SQUARE] = adam ? &exp_avg_sqs : &absent;
  lists[LARGEST] = adam && amsgrad ? &max_exp_avg_sqs : &absent;
  lists[IMPORTANCE] = &importances;
  lists[ANCHOR] = &anchors;
  lists[PATH] = &path_integrals;
  check_lists(count, {&grads}, {&momentum_buffers, &importances, &path_integrals, &remainders});
  check_lists(importances.size(), {&anchors}, {&scales});
  if (adam) {
    check_lists(count, {&exp_avgs, &exp_avg_sqs, &steps}, {&max_exp_avg_sqs});
  }
  if (adam && amsgrad) {
    check_lists(count, {&max_exp_avg_sqs}, {});
  }
  check_scalars(scalars, live_scalars);

  const Place place(params[0]);
  Streams streams("ewc_step", place, scales);
  const std::vector<StepSegment> segments = segments_of(streams, lists);
  const double* live = nullptr;
  if (live_scalars) {
    STD_TORCH_CHECK(place.has(*live_scalars), "ewc_step: wanted live_scalars on the device of the parameters");
    live = static_cast<const double*>(live_scalars->const_data_ptr());
  }
  const auto arguments_for = [&]<typename M>(M) {
    StepArguments<M> args = {};
    args.rule.variant = variant_of(variant);
    args.rule.nesterov = nesterov;
    args.rule.first = first;
    args.rule.decoupled = adam && decoupled_weight_decay;
    args.rule.clip_penalty = clip_penalty;
    args.rule.regularized_path = regularized_path;
    if (live == nullptr) {
      args.rule.set(scalars.data());
    }
    args.maximize = maximize;
    args.clip_coef = streams.scalar(clip_coef);
    args.grad_scale = streams.scalar(grad_scale);
    args.found_inf = streams.scalar(found_inf);
    args.live_scalars = live;
    return args;
  };
  StepArguments<float> floats = arguments_for(float{});
  StepArguments<double> doubles = arguments_for(double{});
  std::optional<Tensor> corrections;
  if (adam) {
    corrections = advance(place, steps, scalars, live, floats.found_inf);
    floats.corrections = doubles.corrections = static_cast<const double2*>(corrections->const_data_ptr());
  }
  launch_steps(place, adam, segments, floats);
  launch_steps(place, adam, segments, doubles);
  streams.copy_back();
}

} // namespace
} // namespace fastewc

STABLE_TORCH_LIBRARY_IMPL(fastewc, CUDA, m) {
  m.impl("ewc_step", TORCH_BOX(&fastewc::ewc_step_cuda));
}
