// What the CUDA ops of the penalty share: their arguments, what a thread knows of its weights, and the call on the host.
#pragma once

#include "../ewc_step/rule.h"
#include "../multi_tensor_cuda.h"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastewc {

enum List { PARAM, IMPORTANCE, ANCHOR, GRAD, OUT, LISTS };

struct PenaltySegment : Segment<LISTS> {
  double lr = 0;
};

struct PenaltyArguments {
  Table<PenaltySegment> table;
  double ewc_lambda;
  const double* live_lrs; // or null: the segments' own
  bool stabilized, negate;
  int chunks;
  DeviceScalar scale, skip;
  double* partials; // a chunk's sum, or its TERMS
  unsigned long long* bins;
};

// λ and α of one tensor in the arithmetic's type, and what follows from them.
template <typename M>
struct Factors {
  M lambda, lr, alpha_lambda, limit;
  bool stabilized;

  __device__ Factors(const PenaltyArguments& args, const PenaltySegment& segment) : stabilized(args.stabilized) {
    const double alpha = args.live_lrs ? args.live_lrs[segment.index] : segment.lr;
    lambda = static_cast<M>(args.ewc_lambda);
    lr = static_cast<M>(alpha);
    alpha_lambda = static_cast<M>(args.ewc_lambda * alpha);
    limit = stiffness_limit<M>(alpha);
  }

  // c of E1 or E2.
  __device__ M stiffness(M omega) const {
    return stabilized ? stabilized_stiffness(omega, lambda, lr, limit) : lambda * omega;
  }
};

// w, Ω and w* of a thread's elements; 0 beyond the end, so that they add nothing to a sum.
template <typename M, int N>
struct Weights {
  M w[N], omega[N], anchor[N];

  __device__ __forceinline__ Weights(const PenaltySegment& segment, const Tile<N>& tile) {
    Loaded<M, N> stored_w, stored_anchor;
    LoadedImportance<M, N> importance;
    stored_w.load(segment, PARAM, tile);
    importance.load(segment, IMPORTANCE, tile);
    stored_anchor.load(segment, ANCHOR, tile);
    stored_w.convert(segment.dtypes[PARAM], w);
    importance.convert(segment, IMPORTANCE, tile, omega);
    stored_anchor.convert(segment.dtypes[ANCHOR], anchor);
  }
};

// A tensor that belongs to a list of its entry.
struct Member {
  List list;
  const Tensor& tensor;
  bool written = false;
};

inline const Tensor& first_of(const char* op, const std::vector<Tensor>& params) {
  STD_TORCH_CHECK(!params.empty(), op, ": wanted params, given none");
  return params[0];
}

// What the ops have in common: the segments, by the type of their arithmetic, and the arguments of the kernels.
class Call {
 public:
  Call(
      const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& importances,
      const std::vector<Tensor>& scales, const std::vector<Tensor>& anchors, double ewc_lambda,
      std::vector<double> lrs, const std::optional<Tensor>& live_lrs, const std::string& variant)
      : place(first_of(op, params)), streams(op, place, scales), op_(op), lrs_(std::move(lrs)) {
    const size_t count = params.size(), given = live_lrs ? live_lrs->numel() : lrs_.size();
    STD_TORCH_CHECK(
        importances.size() == count && anchors.size() == count && given == count &&
            (scales.empty() || scales.size() == count),
        op,
        ": wanted an importance, an anchor, a learning rate and, with codes, scales for each of ", count,
        " params, given ", importances.size(), ", ", anchors.size(), ", ", given, " and ", scales.size());
    STD_TORCH_CHECK(
        variant == "plain" || variant == "stabilized", op, ": wanted variant \"plain\" or \"stabilized\", given \"",
        variant, "\"");
    args.ewc_lambda = ewc_lambda;
    args.stabilized = variant == "stabilized";
    if (live_lrs) {
      STD_TORCH_CHECK(
          place.has(*live_lrs) && live_lrs->scalar_type() == ScalarType::Double && live_lrs->is_contiguous(), op,
          ": wanted contiguous float64 live_lrs on the device of the params");
      args.live_lrs = static_cast<const double*>(live_lrs->const_data_ptr());
      lrs_.assign(count, 0);
    }
  }

  // The next entry: its members, all taken in the layout of one of them.
  void add(const Tensor& layout, std::initializer_list<Member> members) {
    const bool wide = std::any_of(members.begin(), members.end(), [&](const Member& member) {
      return dtype_of(op_, member.tensor) == ScalarType::Double;
    });
    PenaltySegment segment;
    segment.size = layout.numel();
    segment.index = entries_;
    segment.lr = lrs_[entries_++];
    streams.begin(layout, wide ? ScalarType::Double : ScalarType::Float);
    for (const auto& [list, tensor, written] : members) {
      if (list == IMPORTANCE) {
        streams.put_importance(segment, list, tensor, segment.index);
      } else {
        streams.put(segment, list, tensor, written);
      }
    }
    if (segment.size > 0) {
      (wide ? doubles_ : floats_).push_back(segment);
    }
  }

  // Calls launch(kernel, chunks) until every segment has had its turn.
  template <typename F>
  void launch_all(void (*on_floats)(PenaltyArguments), void (*on_doubles)(PenaltyArguments), const F& launch) {
    const auto run = [&](auto kernel, const std::vector<PenaltySegment>& segments, int chunk_size) {
      for_each_table(segments, chunk_size, [&](const Table<PenaltySegment>& table, int64_t chunks) {
        args.table = table;
        args.chunks = static_cast<int>(chunks);
        launch(kernel, chunks);
      });
    };
    run(on_floats, floats_, chunk_size<float>());
    run(on_doubles, doubles_, chunk_size<double>());
  }

  void launch_all(void (*on_floats)(PenaltyArguments), void (*on_doubles)(PenaltyArguments)) {
    launch_all(on_floats, on_doubles, [&](auto kernel, int64_t chunks) { place.launch(kernel, chunks, args); });
  }

  int64_t chunks() const {
    return count_chunks(floats_, chunk_size<float>()) + count_chunks(doubles_, chunk_size<double>());
  }

  const Place place;
  Streams streams;
  PenaltyArguments args = {};

 private:
  template <typename M>
  int chunk_size() const {
    return place.chunk_size(total_size(floats_) + total_size(doubles_), Tile<VECTOR<M>>::SIZE);
  }

  const char* op_;
  std::vector<double> lrs_;
  int entries_ = 0;
  std::vector<PenaltySegment> floats_, doubles_;
};

} // namespace fastewc
