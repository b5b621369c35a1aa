// A group: what a thread takes at a time of a row or of a tensor, and how groups are read and written. Which elements
// are one group is a matter of their number alone; where they lie only decides how they are fetched.
#pragma once

#include <type_traits>

#include "units.h"
// after it
#include "../logits.h"
#include "../scalar_types.h"

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

// A group as it is stored, side by side, in steps of 16 bytes.
template <typename scalar_t>
struct Packed {
  using acc_t = AccOf<scalar_t>;
  static constexpr int kPerPiece = sizeof(device::Bytes16) / sizeof(scalar_t);
  static constexpr int kPieces = kGroup<acc_t> / kPerPiece;
  device::Bytes16 pieces[kPieces];

  Packed() = default;
  KLDIV_DEVICE explicit Packed(const Group<acc_t>& group) {
    KLDIV_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      scalar_t values[kPerPiece];
      KLDIV_UNROLL
      for (int j = 0; j < kPerPiece; ++j) values[j] = narrow<scalar_t>(group.x[i * kPerPiece + j]);
      __builtin_memcpy(&pieces[i], values, sizeof(values));
    }
  }
  KLDIV_DEVICE Group<acc_t> widened() const {
    Group<acc_t> group;
    if constexpr (std::is_same_v<scalar_t, BFloat16>) {  // an instruction each
      KLDIV_UNROLL
      for (int i = 0; i < kPerPiece / 2; ++i) {
        group.x[2 * i] = detail::float_of(pieces[0].words[i] << 16);
        group.x[2 * i + 1] = detail::float_of(pieces[0].words[i] & 0xffff0000u);
      }
    } else {
      KLDIV_UNROLL
      for (int i = 0; i < kPieces; ++i) {
        scalar_t values[kPerPiece];
        __builtin_memcpy(values, &pieces[i], sizeof(values));
        KLDIV_UNROLL
        for (int j = 0; j < kPerPiece; ++j) group.x[i * kPerPiece + j] = widen<acc_t>(values[j]);
      }
    }
    return group;
  }
};

// Whether they are read again soon.
enum class Use { kAgain, kOnce };

KLDIV_DEVICE bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(device::Bytes16) == 0;
}

// A whole group at an address that is aligned.
template <Use use, typename scalar_t>
KLDIV_DEVICE Group<AccOf<scalar_t>> load_aligned(const scalar_t* data) {
  Packed<scalar_t> packed;
  KLDIV_UNROLL
  for (int i = 0; i < packed.kPieces; ++i) {
    const scalar_t* const from = data + i * packed.kPerPiece;
    packed.pieces[i] = use == Use::kOnce ? device::load16_once(from) : device::load16(from);
  }
  return packed.widened();
}
template <typename scalar_t>
KLDIV_DEVICE void store_aligned(scalar_t* data, const Group<AccOf<scalar_t>>& group) {
  const Packed<scalar_t> packed(group);
  KLDIV_UNROLL
  for (int i = 0; i < packed.kPieces; ++i) device::store16_once(data + i * packed.kPerPiece, packed.pieces[i]);
}

// The n elements `stride` apart from `data` on, filled up to a group with `padding`.
template <typename acc_t, typename scalar_t>
KLDIV_DEVICE Group<acc_t> load_each(const scalar_t* data, int64_t stride, int n, acc_t padding) {
  Group<acc_t> group;
  KLDIV_UNROLL
  for (int i = 0; i < kGroup<acc_t>; ++i) group.x[i] = i < n ? widen<acc_t>(data[i * stride]) : padding;
  return group;
}
// Writes the first n elements of a group.
template <typename acc_t, typename scalar_t>
KLDIV_DEVICE void store_each(scalar_t* data, int64_t stride, int n, const Group<acc_t>& group) {
  KLDIV_UNROLL
  for (int i = 0; i < kGroup<acc_t>; ++i) {
    if (i < n) data[i * stride] = narrow<scalar_t>(group.x[i]);
  }
}

// Elements side by side, however aligned.
template <Use use, typename scalar_t>
KLDIV_DEVICE Group<AccOf<scalar_t>> load_group(const scalar_t* data, int n, AccOf<scalar_t> padding) {
  using acc_t = AccOf<scalar_t>;
  return n >= kGroup<acc_t> && is_aligned(data) ? load_aligned<use>(data) : load_each(data, 1, n, padding);
}
template <typename scalar_t>
KLDIV_DEVICE void store_group(scalar_t* data, int n, const Group<AccOf<scalar_t>>& group) {
  if (n >= kGroup<AccOf<scalar_t>> && is_aligned(data)) {
    store_aligned(data, group);
  } else {
    store_each(data, 1, n, group);
  }
}

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
    group = load_each(from, stride, n, padding);
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
    store_each(to, stride, n, group);
  });
}

// Calls, not inlined: kernels would lose their registers to addresses.
KLDIV_DEVICE_CALL int64_t row_offset_of_many(const RowLayout& layout, int64_t row) { return layout.offset(row); }
KLDIV_DEVICE int64_t row_offset(const RowLayout& layout, int64_t row) {
  return layout.dims == 1 ? row * layout.strides[0] : row_offset_of_many(layout, row);
}

template <typename scalar_t>
KLDIV_DEVICE_CALL Group<AccOf<scalar_t>> load_apart(const scalar_t* data, int stride, int n, AccOf<scalar_t> padding) {
  return load_each(data, stride, n, padding);
}

template <typename scalar_t>
KLDIV_DEVICE_CALL void store_apart(scalar_t* data, int stride, int n, Group<AccOf<scalar_t>> group) {
  store_each(data, stride, n, group);
}

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

// Calls body(first, n) for every group of `count` elements side by side that falls to this one of `threads` threads.
template <typename acc_t, typename Body>
KLDIV_DEVICE void for_each_group(int64_t count, int64_t thread, int64_t threads, const Body& body) {
  constexpr int kSize = kGroup<acc_t>;
  for (int64_t first = thread * kSize; first < count; first += threads * kSize) {
    body(first, count - first < kSize ? static_cast<int>(count - first) : kSize);
  }
}

}  // namespace kldiv::cuda
