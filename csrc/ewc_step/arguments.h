// What ewc_step is given, checked alike on every device; the schema is in fastewc/ops/ewc_step/schema.py.
#pragma once

#include "../common.h"

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace fastewc {

enum class Variant : uint8_t { plain, stabilized, proximal, wva };

inline Variant variant_of(const std::string& name) {
  if (name == "plain") {
    return Variant::plain;
  }
  if (name == "stabilized") {
    return Variant::stabilized;
  }
  if (name == "proximal") {
    return Variant::proximal;
  }
  STD_TORCH_CHECK(
      name == "wva", "ewc_step: wanted variant \"plain\", \"stabilized\", \"proximal\" or \"wva\", given \"", name,
      "\"");
  return Variant::wva;
}

// True for Adam, false for SGD.
inline bool is_adam(const std::string& kind) {
  STD_TORCH_CHECK(
      kind == "adam" || kind == "sgd", "ewc_step: wanted kind \"sgd\" or \"adam\", given \"", kind, "\"");
  return kind == "adam";
}

inline void check_lists(
    size_t count, std::initializer_list<const std::vector<Tensor>*> needed,
    std::initializer_list<const std::vector<Tensor>*> optional) {
  for (const auto* list : needed) {
    STD_TORCH_CHECK(list->size() == count, "ewc_step: wanted lists of ", count, " tensors, given ", list->size());
  }
  for (const auto* list : optional) {
    STD_TORCH_CHECK(
        list->empty() || list->size() == count, "ewc_step: wanted lists of ", count, " tensors or none, given ",
        list->size());
  }
}

inline void check_scalars(const std::vector<double>& scalars, const std::optional<Tensor>& live) {
  if (live) {
    STD_TORCH_CHECK(
        live->scalar_type() == ScalarType::Double && live->numel() == 8 && live->is_contiguous(),
        "ewc_step: wanted live_scalars of 8 contiguous float64 numbers, given ", shape_of(*live), " of ",
        name_of(live->scalar_type()));
  } else {
    STD_TORCH_CHECK(scalars.size() == 8, "ewc_step: wanted 8 scalars, given ", scalars.size());
  }
}

} // namespace fastewc
