// Noise of whole latent frames, written in place: one thread makes the four normals of one counter.
#include <cuda_runtime.h>

#include "philox.cuh"
#include "sfrt.h"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kGridLimit = 65535;  // frames and steps ride on the grid's y and z axes
constexpr int64_t kWord = int64_t{1} << 32;

template <bool kVectorised>
__global__ void __launch_bounds__(kThreads) noise_kernel(float *__restrict__ out, uint64_t seed, uint32_t first_frame,
                                                         uint32_t first_step, int64_t elements) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t start = 4 * group;
  if (start >= elements) return;
  const sfrt::Normals value =
      sfrt::normals(seed, static_cast<uint32_t>(group), first_frame + blockIdx.y, first_step + blockIdx.z);
  const int64_t row = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  float *target = out + row * elements + start;
  if constexpr (kVectorised) {
    *reinterpret_cast<float4 *>(target) = make_float4(value.n[0], value.n[1], value.n[2], value.n[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (start + i < elements) target[i] = value.n[i];
    }
  }
}

// Whether `count` numbers from `first` on all fit one word of the counter and one axis of the grid.
bool fits(int64_t first, int64_t count) {
  return first >= 0 && count >= 0 && count <= kGridLimit && first <= kWord - count;
}

}  // namespace

extern "C" int sfrt_noise(float *out, uint64_t seed, int64_t first_frame, int64_t frames, int64_t first_step,
                          int64_t steps, int64_t elements, void *stream) {
  if (!fits(first_frame, frames) || !fits(first_step, steps)) return SFRT_INVALID_ARGUMENT;
  if (elements < 0 || elements > 4 * kWord) return SFRT_INVALID_ARGUMENT;
  if (frames == 0 || steps == 0 || elements == 0) return 0;
  const auto address = reinterpret_cast<uintptr_t>(out);
  if (address == 0 || address % alignof(float) != 0) return SFRT_INVALID_ARGUMENT;

  const int64_t groups = (elements + 3) / 4;
  const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads), static_cast<unsigned>(frames),
                  static_cast<unsigned>(steps));
  const bool vectorised = elements % 4 == 0 && address % alignof(float4) == 0;
  const auto kernel = vectorised ? noise_kernel<true> : noise_kernel<false>;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      out, seed, static_cast<uint32_t>(first_frame), static_cast<uint32_t>(first_step), elements);
  return static_cast<int>(cudaGetLastError());
}

extern "C" const char *sfrt_error_string(int status) {
  if (status == SFRT_INVALID_ARGUMENT) return "invalid argument";
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
