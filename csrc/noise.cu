// Noise of whole latent frames, written in place: one thread makes the four normals of one counter.
#include "fours.cuh"

namespace {

using namespace sfrt;

template <bool kPacked>
__global__ void __launch_bounds__(kFourThreads) noise_kernel(float *__restrict__ out, Source source, int64_t elements) {
  const uint32_t group = blockIdx.x * kFourThreads + threadIdx.x;
  const int64_t start = int64_t{kFour} * group;
  if (start >= elements) return;
  const Normals made = normals(source, group, blockIdx.y);
  write_four<kPacked>(out + blockIdx.y * elements + start, elements - start,
                      {{made.n[0], made.n[1], made.n[2], made.n[3]}});
}

}  // namespace

extern "C" int sfrt_noise(float *out, const int64_t *seed, const int64_t *first_frame, int64_t step, int64_t frames,
                          int64_t elements, void *stream) {
  if (!fits_counters(step, frames, elements)) return SFRT_INVALID_ARGUMENT;
  if (frames == 0 || elements == 0) return 0;
  if (!present(out, seed, first_frame)) return SFRT_INVALID_ARGUMENT;
  if (!aligned(sizeof(float), out) || !aligned(sizeof(int64_t), seed, first_frame)) return SFRT_INVALID_ARGUMENT;

  const bool packed = elements % kFour == 0 && aligned(kAccess, out);
  const auto kernel = packed ? noise_kernel<true> : noise_kernel<false>;
  kernel<<<grid_of_fours(frames, elements), kFourThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      out, {seed, first_frame, static_cast<uint32_t>(step)}, elements);
  return static_cast<int>(cudaGetLastError());
}

extern "C" const char *sfrt_error_string(int status) {
  if (status == SFRT_INVALID_ARGUMENT) return "invalid argument";
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
