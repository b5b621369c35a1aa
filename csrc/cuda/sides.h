// One side of a row: where its logits are, and where its gradient goes.
#pragma once

#include "../row_state.h"
#include "groups.h"
#include "team.h"

namespace kldiv::cuda {

// The columns of a group: n of them, 1 << shift apart.
struct Place {
  uint32_t first;
  int shift, n;

  KLDIV_DEVICE uint32_t column(int i) const { return first + (static_cast<uint32_t>(i) << shift); }
  KLDIV_DEVICE int stride() const { return 1 << shift; }
};

// The groups of `columns` that fall to this thread of a team. Side by side where that leaves no part of a group, so
// that all of them are 16-byte accesses; otherwise, where rows begin at any address, a group is what one lane takes of
// neighbouring columns that the lanes read together.
template <typename acc_t>
class Places {
 public:
  template <typename Team>
  KLDIV_DEVICE Places(uint32_t columns, const Team& team)
      : columns_(columns), step_(team.threads() * kSize), shift_(columns % kSize == 0 ? 0 : team.log2_lanes()) {
    const uint32_t lane = shift_ == 0 ? 0 : team.thread() % team.lanes();
    first_ = (team.thread() - lane) * kSize + lane;
  }

  KLDIV_DEVICE int count() const {
    return columns_ > first_ ? static_cast<int>((columns_ - first_ + step_ - 1) / step_) : 0;
  }

  // Calls body(place) for each.
  template <typename Body>
  KLDIV_DEVICE void for_each(const Body& body) const {
    KLDIV_NO_UNROLL
    for (uint32_t first = first_; first < columns_; first += step_) body(at(first));
  }

 private:
  static constexpr uint32_t kSize = kGroup<acc_t>;

  KLDIV_DEVICE Place at(uint32_t first) const {
    const uint32_t left = (columns_ - first + (1u << shift_) - 1) >> shift_;
    return {first, shift_, static_cast<int>(left < kSize ? left : kSize)};
  }

  const uint32_t columns_, step_;
  const int shift_;
  uint32_t first_;
};

// Whether DenseSide can read both sides, and write a gradient.
inline bool is_dense(const LogitsArgs& args) {
  const Scaling<double> scaling(args);
  return args.student.dtype == args.teacher.dtype && args.student.layout.column_stride == 1 &&
         args.teacher.layout.column_stride == 1 && scaling.student.is_identity() && scaling.teacher.is_identity();
}
inline bool is_dense(const LogitsGradient& gradient, Dtype logits) {
  const Dtype dtype = gradient.out.dtype;
  const bool narrowed = logits == Dtype::kFloat32 && (dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16);
  return gradient.out.data == nullptr || (gradient.layout.column_stride == 1 && (dtype == logits || narrowed));
}

// scalar_t, side by side, as they are.
template <typename scalar>
class DenseSide {
 public:
  using scalar_t = scalar;
  using acc_t = AccOf<scalar_t>;

  KLDIV_DEVICE DenseSide(const Matrix& matrix, const LogitMap<acc_t>&, int64_t row)
      : row_(static_cast<const scalar_t*>(matrix.data) + row_offset(matrix.layout, row)) {}

  template <Use use>
  KLDIV_DEVICE Group<acc_t> load(const Place& place, acc_t padding) const {
    const scalar_t* const data = at(place.first);
    return place.shift == 0 && is_aligned(data) ? load_aligned<use>(data)
                                                : load_apart(data, place.stride(), place.n, padding);
  }
  KLDIV_DEVICE acc_t logit(uint32_t column) const { return widen<acc_t>(*at(column)); }
  KLDIV_DEVICE const scalar_t* at(uint32_t column) const { return row_ + column; }

  using Narrow = Constant<sizeof(scalar_t) == 2>;  // see Difference

  // What d loss / d mapped logits means for the stored ones.
  KLDIV_DEVICE Group<acc_t> chained(const Group<acc_t>& gradient, const Place&) const { return gradient; }

  // A row of a gradient from column `begin` on, and a group of it.
  using Target = void*;
  KLDIV_DEVICE static Target target(const LogitsGradient& to, int64_t row, int64_t begin = 0) {
    Target target = nullptr;
    with_dtype(to, [&](auto type) {
      target = static_cast<decltype(type)*>(to.out.data) + row_offset(to.layout, row) + begin;
    });
    return target;
  }
  KLDIV_DEVICE static void store(const LogitsGradient& to, Target row, const Place& place, const Group<acc_t>& group) {
    with_dtype(to, [&](auto type) {
      auto* const data = static_cast<decltype(type)*>(row) + place.first;
      if (place.shift == 0 && is_aligned(data)) {
        store_aligned(data, group);
      } else {
        store_apart(data, place.stride(), place.n, group);
      }
    });
  }

 private:
  // A gradient has its logits' dtype or, of float logits, one of 16 bits.
  template <typename Function>
  KLDIV_DEVICE static void with_dtype(const LogitsGradient& to, const Function& function) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (to.out.dtype == Dtype::kBFloat16) return function(BFloat16{});
      if (to.out.dtype == Dtype::kFloat16) return function(Float16{});
    }
    function(scalar_t{});
  }

  const scalar_t* row_;
};

// Any dtype, any stride, scaled or capped: what is too rare to deserve kernels of its own.
template <typename acc>
class AnySide {
 public:
  using acc_t = acc;

  KLDIV_DEVICE AnySide(const Matrix& matrix, const LogitMap<acc_t>& map, int64_t row)
      : matrix_(matrix), map_(map), row_(row) {}

  template <Use>
  KLDIV_DEVICE Group<acc_t> load(const Place& place, acc_t padding) const {
    return load_mapped(matrix_.data, matrix_.dtype, offset(place), stride(place), place.n, padding, map_);
  }
  KLDIV_DEVICE acc_t logit(uint32_t column) const { return load<Use::kAgain>({column, 0, 1}, 0).x[0]; }

  using Narrow = Constant<false>;  // whatever the dtype: one kernel for all

  KLDIV_DEVICE Group<acc_t> chained(Group<acc_t> gradient, const Place& place) const {
    if (map_.is_identity()) return gradient;
    const Group<acc_t> slopes = load_slopes(matrix_.data, matrix_.dtype, offset(place), stride(place), place.n, map_);
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) gradient.x[i] *= slopes.x[i];
    return gradient;
  }

  struct Target {  // no address: that would take more registers
    int64_t row, begin;
  };
  KLDIV_DEVICE static Target target(const LogitsGradient&, int64_t row, int64_t begin = 0) { return {row, begin}; }
  KLDIV_DEVICE static void store(const LogitsGradient& to, Target target, const Place& place,
                                 const Group<acc_t>& group) {
    const int64_t stride = to.layout.column_stride;
    const int64_t offset = row_offset(to.layout, target.row) + (target.begin + place.first) * stride;
    store_any(to.out.data, to.out.dtype, offset, stride << place.shift, place.n, group);
  }

 private:
  KLDIV_DEVICE int64_t stride(const Place& place) const { return matrix_.layout.column_stride << place.shift; }
  KLDIV_DEVICE int64_t offset(const Place& place) const {
    return row_offset(matrix_.layout, row_) + place.first * matrix_.layout.column_stride;
  }

  const Matrix& matrix_;
  const LogitMap<acc_t>& map_;
  const int64_t row_;
};

}  // namespace kldiv::cuda
