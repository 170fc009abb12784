// In which type the penalty computes.
#pragma once

#include "../common.h"

namespace fastewc {

// In double where Ω is, or where Ω is stored in fewer bits than a float has and the weight is.
inline bool is_wide(const Tensor& param, const Tensor& importance) {
  const ScalarType dtype = importance.scalar_type();
  return dtype == ScalarType::Double || (dtype != ScalarType::Float && param.scalar_type() == ScalarType::Double);
}

} // namespace fastewc
