// Four neighbouring elements of a latent frame: those that one counter of the generator makes the normals of.
#pragma once

#include "philox.cuh"
#include "rows.cuh"

namespace sfrt {

constexpr int kFour = 4;
constexpr int kFourThreads = 128;
constexpr int64_t kMaxElements = int64_t{1} << 30;  // in a latent frame
constexpr int64_t kMaxFrames = 65535;               // of a launch, on the grid's y axis

// At once, or one by one up to the end of the frame: `left` elements are left of it.
template <bool kPacked, typename T>
__device__ __forceinline__ Pack<T, kFour> read_four(const T *from, int64_t left) {
  if constexpr (kPacked) return load<kFour>(from);
  Floats<kFour> found{};
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < left) found[i] = static_cast<float>(from[i]);
  }
  return Pack<T, kFour>::of(found);
}

template <bool kPacked, typename T>
__device__ __forceinline__ void write_four(T *to, int64_t left, const Floats<kFour> &values) {
  if constexpr (kPacked) {
    store(to, Pack<T, kFour>::of(values));
  } else {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      if (i < left) to[i] = static_cast<T>(values[i]);
    }
  }
}

// On the host.

inline bool fits_counters(int64_t step, int64_t frames, int64_t elements) {
  return step >= 0 && step <= UINT32_MAX && frames >= 0 && frames <= kMaxFrames && elements >= 0 &&
         elements <= kMaxElements;
}

// A thread for every four elements; frames on the y axis.
inline dim3 grid_of_fours(int64_t frames, int64_t elements) {
  const int64_t fours = (elements + kFour - 1) / kFour;
  return {static_cast<unsigned>((fours + kFourThreads - 1) / kFourThreads), static_cast<unsigned>(frames)};
}

}  // namespace sfrt
