// A group: consecutive elements, what a thread takes at a time, and how groups are read and written. Which
// elements are one group is a matter of their index alone; where they lie only decides how they are fetched.
#pragma once

#include <type_traits>

#include "../logits.h"
#include "../scalar_types.h"
#include "device.h"

namespace kldiv::cuda {

// Two accesses of 16 bytes in acc_t.
template <typename acc_t>
constexpr int kGroup = 32 / sizeof(acc_t);

template <typename acc_t>
struct Group {
  acc_t x[kGroup<acc_t>];
};

// What a storage type is computed in.
template <typename scalar_t>
using AccOf = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Whether the rows are read again soon.
enum class Use { kAgain, kOnce };

template <typename scalar_t>
KLDIV_DEVICE bool in_16_byte_steps(const scalar_t* data, int n) {
  return n >= kGroup<AccOf<scalar_t>> && reinterpret_cast<uintptr_t>(data) % sizeof(device::Bytes16) == 0;
}

// The n elements from `data` on, filled up to a group with `padding`.
template <Use use, typename scalar_t>
KLDIV_DEVICE Group<AccOf<scalar_t>> load_group(const scalar_t* data, int n, AccOf<scalar_t> padding) {
  using acc_t = AccOf<scalar_t>;
  constexpr int kStep = sizeof(device::Bytes16) / sizeof(scalar_t);
  Group<acc_t> group;
  if (in_16_byte_steps(data, n)) {
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; i += kStep) {
      const auto bytes = use == Use::kOnce ? device::load16_once(data + i) : device::load16(data + i);
      scalar_t values[kStep];
      __builtin_memcpy(values, &bytes, sizeof(bytes));
      KLDIV_UNROLL
      for (int j = 0; j < kStep; ++j) group.x[i + j] = widen<acc_t>(values[j]);
    }
  } else {
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) group.x[i] = i < n ? widen<acc_t>(data[i]) : padding;
  }
  return group;
}

// Writes the first n elements of a group.
template <typename scalar_t>
KLDIV_DEVICE void store_group(scalar_t* data, int n, const Group<AccOf<scalar_t>>& group) {
  constexpr int kSize = kGroup<AccOf<scalar_t>>;
  constexpr int kStep = sizeof(device::Bytes16) / sizeof(scalar_t);
  if (in_16_byte_steps(data, n)) {
    KLDIV_UNROLL
    for (int i = 0; i < kSize; i += kStep) {
      scalar_t values[kStep];
      KLDIV_UNROLL
      for (int j = 0; j < kStep; ++j) values[j] = narrow<scalar_t>(group.x[i + j]);
      device::Bytes16 bytes;
      __builtin_memcpy(&bytes, values, sizeof(bytes));
      device::store16_once(data + i, bytes);
    }
  } else {
    KLDIV_UNROLL
    for (int i = 0; i < kSize; ++i) {
      if (i < n) data[i] = narrow<scalar_t>(group.x[i]);
    }
  }
}

// Whether DenseSide can read both sides, and write a gradient.
inline bool is_dense(const LogitsArgs& args) {
  const Scaling<double> scaling(args);
  return args.student.dtype == args.teacher.dtype && args.student.layout.column_stride == 1 &&
         args.teacher.layout.column_stride == 1 && scaling.student.is_identity() && scaling.teacher.is_identity();
}
inline bool is_dense(const LogitsGradient& gradient) {
  return gradient.out.data == nullptr || gradient.layout.column_stride == 1;
}

// One side of a row, columns [first, first + n) at a time. DenseSide: scalar_t, side by side, as they are.
template <typename scalar_t>
class DenseSide {
 public:
  using acc_t = AccOf<scalar_t>;

  KLDIV_DEVICE DenseSide(const Matrix& matrix, const LogitMap<acc_t>&, int64_t row)
      : row_(static_cast<const scalar_t*>(matrix.data) + matrix.layout.offset(row)) {}

  template <Use use>
  KLDIV_DEVICE Group<acc_t> load(uint32_t first, int n, acc_t padding) const {
    return load_group<use>(row_ + first, n, padding);
  }
  // What d loss / d mapped logits means for the stored ones.
  KLDIV_DEVICE Group<acc_t> chained(const Group<acc_t>& gradient, uint32_t, int) const { return gradient; }

  // A row of a gradient, and its columns [first, first + n).
  using Target = scalar_t*;
  KLDIV_DEVICE static Target target(const LogitsGradient& to, int64_t row) {
    return static_cast<scalar_t*>(to.out.data) + to.layout.offset(row);
  }
  KLDIV_DEVICE static void store(const LogitsGradient&, Target row, int64_t first, int n, const Group<acc_t>& group) {
    store_group(row + first, n, group);
  }

 private:
  const scalar_t* row_;
};

// Groups of any dtype and stride.
template <typename acc_t>
KLDIV_DEVICE Group<acc_t> gather(const void* data, Dtype dtype, int64_t offset, int64_t stride, int n, acc_t padding) {
  Group<acc_t> group;
  dispatch_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const auto* from = static_cast<const scalar_t*>(data) + offset;
    if constexpr (std::is_same_v<AccOf<scalar_t>, acc_t>) {
      if (stride == 1) {
        group = load_group<Use::kAgain>(from, n, padding);
        return;
      }
    }
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) group.x[i] = i < n ? widen<acc_t>(from[i * stride]) : padding;
  });
  return group;
}

template <typename acc_t>
KLDIV_DEVICE void scatter(void* data, Dtype dtype, int64_t offset, int64_t stride, int n, const Group<acc_t>& group) {
  dispatch_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    auto* to = static_cast<scalar_t*>(data) + offset;
    if constexpr (std::is_same_v<AccOf<scalar_t>, acc_t>) {
      if (stride == 1) return store_group(to, n, group);
    }
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) {
      if (i < n) to[i * stride] = narrow<scalar_t>(group.x[i]);
    }
  });
}

// Calls, not inlined: kernels would lose their registers to addresses.
template <typename acc_t>
KLDIV_DEVICE_CALL Group<acc_t> load_any(const void* data, Dtype dtype, int64_t offset, int64_t stride, int n,
                                        acc_t padding) {
  return gather(data, dtype, offset, stride, n, padding);
}

template <typename acc_t>
KLDIV_DEVICE_CALL void store_any(void* data, Dtype dtype, int64_t offset, int64_t stride, int n, Group<acc_t> group) {
  scatter(data, dtype, offset, stride, n, group);
}

template <typename acc_t>
KLDIV_DEVICE_CALL Group<acc_t> load_mapped(const void* data, Dtype dtype, int64_t offset, int64_t stride, int n,
                                           acc_t padding, LogitMap<acc_t> map) {
  Group<acc_t> group = gather(data, dtype, offset, stride, n, padding);
  if (map.is_identity()) return group;
  KLDIV_UNROLL
  for (int i = 0; i < kGroup<acc_t>; ++i) group.x[i] = i < n ? map(group.x[i]) : padding;
  return group;
}

// The map's derivatives.
template <typename acc_t>
KLDIV_DEVICE_CALL Group<acc_t> load_slopes(const void* data, Dtype dtype, int64_t offset, int64_t stride, int n,
                                           LogitMap<acc_t> map) {
  Group<acc_t> group = gather(data, dtype, offset, stride, n, acc_t(0));
  KLDIV_UNROLL
  for (int i = 0; i < kGroup<acc_t>; ++i) group.x[i] = map.slope(group.x[i]);
  return group;
}

// Any dtype, any stride, scaled or capped: what is too rare to deserve kernels of its own.
template <typename acc>
class AnySide {
 public:
  using acc_t = acc;

  KLDIV_DEVICE AnySide(const Matrix& matrix, const LogitMap<acc_t>& map, int64_t row)
      : matrix_(matrix), map_(map), row_(row) {}

  template <Use>
  KLDIV_DEVICE Group<acc_t> load(uint32_t first, int n, acc_t padding) const {
    const int64_t stride = matrix_.layout.column_stride;
    return load_mapped(matrix_.data, matrix_.dtype, offset(first), stride, n, padding, map_);
  }
  KLDIV_DEVICE Group<acc_t> chained(Group<acc_t> gradient, uint32_t first, int n) const {
    if (map_.is_identity()) return gradient;
    const int64_t stride = matrix_.layout.column_stride;
    const Group<acc_t> slopes = load_slopes(matrix_.data, matrix_.dtype, offset(first), stride, n, map_);
    KLDIV_UNROLL
    for (int i = 0; i < kGroup<acc_t>; ++i) gradient.x[i] *= slopes.x[i];
    return gradient;
  }

  using Target = int64_t;  // its index: an address would take registers
  KLDIV_DEVICE static Target target(const LogitsGradient&, int64_t row) { return row; }
  KLDIV_DEVICE static void store(const LogitsGradient& to, Target row, int64_t first, int n,
                                 const Group<acc_t>& group) {
    const int64_t stride = to.layout.column_stride;
    store_any(to.out.data, to.out.dtype, to.layout.offset(row) + first * stride, stride, n, group);
  }

 private:
  KLDIV_DEVICE int64_t offset(uint32_t first) const {
    return matrix_.layout.offset(row_) + first * matrix_.layout.column_stride;
  }

  const Matrix& matrix_;
  const LogitMap<acc_t>& map_;
  const int64_t row_;
};

// Calls body(first, n) for every group of `count` elements that falls to this one of `threads` threads. index_t must
// hold count + kGroup * threads.
template <typename acc_t, typename index_t, typename Body>
KLDIV_DEVICE void for_each_group(index_t count, index_t thread, index_t threads, const Body& body) {
  constexpr int kSize = kGroup<acc_t>;
  for (index_t first = thread * kSize; first < count; first += threads * kSize) {
    body(first, count - first < kSize ? static_cast<int>(count - first) : kSize);
  }
}

}  // namespace kldiv::cuda
