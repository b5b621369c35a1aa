// A group: eight consecutive elements, what a thread takes at a time, and how groups are read and written. Which
// elements are one group is a matter of their index alone; where they lie only decides how they are fetched.
#pragma once

#include <type_traits>

#include "../math.h"
#include "../scalar_types.h"
#include "device.h"

namespace kldiv::cuda {

constexpr int kGroup = 8;

template <typename acc_t>
struct Group {
  acc_t x[kGroup];
};

// What a storage type is computed in.
template <typename scalar_t>
using AccOf = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Whether the rows are read again soon.
enum class Use { kAgain, kOnce };

template <typename scalar_t>
KLDIV_DEVICE bool in_16_byte_steps(const scalar_t* data, int64_t n) {
  return n >= kGroup && reinterpret_cast<uintptr_t>(data) % sizeof(device::Bytes16) == 0;
}

// The n elements from `data` on, filled up to a group with `padding`.
template <Use use, typename scalar_t>
KLDIV_DEVICE Group<AccOf<scalar_t>> load_group(const scalar_t* data, int64_t n, AccOf<scalar_t> padding) {
  using acc_t = AccOf<scalar_t>;
  constexpr int kStep = sizeof(device::Bytes16) / sizeof(scalar_t);
  Group<acc_t> group;
  if (in_16_byte_steps(data, n)) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kStep) {
      const auto bytes = use == Use::kOnce ? device::load16_once(data + i) : device::load16(data + i);
      scalar_t values[kStep];
      __builtin_memcpy(values, &bytes, sizeof(bytes));
#pragma unroll
      for (int j = 0; j < kStep; ++j) group.x[i + j] = widen<acc_t>(values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.x[i] = i < n ? widen<acc_t>(data[i]) : padding;
  }
  return group;
}

// Writes the first n elements of a group.
template <typename scalar_t>
KLDIV_DEVICE void store_group(scalar_t* data, int64_t n, const Group<AccOf<scalar_t>>& group) {
  constexpr int kStep = sizeof(device::Bytes16) / sizeof(scalar_t);
  if (in_16_byte_steps(data, n)) {
#pragma unroll
    for (int i = 0; i < kGroup; i += kStep) {
      scalar_t values[kStep];
#pragma unroll
      for (int j = 0; j < kStep; ++j) values[j] = narrow<scalar_t>(group.x[i + j]);
      device::Bytes16 bytes;
      __builtin_memcpy(&bytes, values, sizeof(bytes));
      device::store16_once(data + i, bytes);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < n) data[i] = narrow<scalar_t>(group.x[i]);
    }
  }
}

template <typename acc_t>
KLDIV_DEVICE acc_t load_element(const void* data, Dtype dtype, int64_t offset) {
  acc_t x{};
  dispatch_dtype(dtype, [&](auto type) { x = widen<acc_t>(static_cast<const decltype(type)*>(data)[offset]); });
  return x;
}

// One side of a kernel: the elements of a matrix in row-major order from a row on. DenseSide is for a matrix of
// scalar_t whose columns lie side by side; it stays within the one row unless the rows do so too.
template <typename scalar_t>
class DenseSide {
 public:
  using acc_t = AccOf<scalar_t>;

  KLDIV_DEVICE DenseSide(const Matrix& matrix, int64_t row, int64_t /*columns*/)
      : data_(static_cast<const scalar_t*>(matrix.data) + matrix.layout.offset(row)) {}

  template <Use use>
  KLDIV_DEVICE Group<acc_t> load(int64_t first, int64_t n, acc_t padding) const {
    return load_group<use>(data_ + first, n, padding);
  }

  KLDIV_DEVICE static void store(const Output& output, int64_t first, int64_t n, const Group<acc_t>& group) {
    store_group(static_cast<scalar_t*>(output.data) + first, n, group);
  }

 private:
  const scalar_t* data_;
};

// Any dtype and any strides, element by element: for what is too rare to deserve kernels of its own.
template <typename acc>
class AnySide {
 public:
  using acc_t = acc;

  KLDIV_DEVICE AnySide(const Matrix& matrix, int64_t row, int64_t columns)
      : matrix_(matrix), row_(row), columns_(columns) {}

  template <Use>
  KLDIV_DEVICE Group<acc_t> load(int64_t first, int64_t n, acc_t padding) const {
    Group<acc_t> group;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.x[i] = i < n ? element(first + i) : padding;
    return group;
  }

  KLDIV_DEVICE static void store(const Output& output, int64_t first, int64_t n, const Group<acc_t>& group) {
    dispatch_dtype(output.dtype, [&](auto type) {
      using scalar_t = decltype(type);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < n) static_cast<scalar_t*>(output.data)[first + i] = narrow<scalar_t>(group.x[i]);
      }
    });
  }

 private:
  KLDIV_DEVICE acc_t element(int64_t index) const {
    const int64_t row = index / columns_;
    return load_element<acc_t>(matrix_.data, matrix_.dtype,
                               matrix_.layout.offset(row_ + row) + (index - row * columns_) * matrix_.layout.column_stride);
  }

  const Matrix& matrix_;
  const int64_t row_, columns_;
};

// Calls body(first, n) for every group of `count` elements that falls to this one of `threads` threads.
template <typename Body>
KLDIV_DEVICE void for_each_group(int64_t count, int64_t thread, int64_t threads, const Body& body) {
  for (int64_t first = thread * kGroup; first < count; first += threads * kGroup) {
    body(first, count - first < kGroup ? count - first : kGroup);
  }
}

}  // namespace kldiv::cuda
