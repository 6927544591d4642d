// Noise of whole latent frames, written in place: one thread makes the four normals of one counter.
#include <cuda_runtime.h>

#include "philox.cuh"
#include "sfrt.h"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxFrames = 65535;  // frames ride on the grid's y axis
constexpr int64_t kWord = int64_t{1} << 32;

template <bool kVectorised>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(float *__restrict__ out, uint64_t seed, uint32_t first_frame, uint32_t step, int64_t elements) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t start = 4 * group;
  if (start >= elements) return;
  const sfrt::Normals value = sfrt::normals(seed, static_cast<uint32_t>(group), first_frame + blockIdx.y, step);
  float *row = out + static_cast<int64_t>(blockIdx.y) * elements + start;
  if constexpr (kVectorised) {
    *reinterpret_cast<float4 *>(row) = make_float4(value.n[0], value.n[1], value.n[2], value.n[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (start + i < elements) row[i] = value.n[i];
    }
  }
}

}  // namespace

extern "C" int sfrt_noise(float *out, uint64_t seed, int64_t first_frame, int64_t frames, int64_t step,
                          int64_t elements, void *stream) {
  if (frames < 0 || frames > kMaxFrames || elements < 0 || elements > 4 * kWord) return SFRT_INVALID_ARGUMENT;
  if (first_frame < 0 || first_frame + frames > kWord || step < 0 || step >= kWord) return SFRT_INVALID_ARGUMENT;
  if (frames == 0 || elements == 0) return 0;
  const auto address = reinterpret_cast<uintptr_t>(out);
  if (address == 0 || address % alignof(float) != 0) return SFRT_INVALID_ARGUMENT;

  const int64_t groups = (elements + 3) / 4;
  const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads), static_cast<unsigned>(frames));
  const bool vectorised = elements % 4 == 0 && address % alignof(float4) == 0;
  const auto kernel = vectorised ? noise_kernel<true> : noise_kernel<false>;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      out, seed, static_cast<uint32_t>(first_frame), static_cast<uint32_t>(step), elements);
  return static_cast<int>(cudaGetLastError());
}

extern "C" const char *sfrt_error_string(int status) {
  if (status == SFRT_INVALID_ARGUMENT) return "invalid argument";
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
