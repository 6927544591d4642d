// The update between two passes, its normals made in registers; and the last one, which turns tokens into latents.
#include "fours.cuh"

namespace {

using namespace sfrt;

struct Update {
  float follow, keep, fresh;
};

// One thread updates the four elements of one counter: 16 bytes of x, and many threads to hide what the normals take.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kFourThreads)
    denoise_kernel(const float *__restrict__ x, const T *__restrict__ flow, Update update, Source source,
                   int64_t elements, float *__restrict__ out, T *__restrict__ copy) {
  const uint32_t group = blockIdx.x * kFourThreads + threadIdx.x;
  const int64_t start = int64_t{kFour} * group;
  if (start >= elements) return;
  const int64_t at = blockIdx.y * elements + start, left = elements - start;
  const Pack<float, kFour> from = read_four<kPacked>(x + at, left);
  Pack<T, kFour> along{};
  if (flow != nullptr) along = read_four<kPacked>(flow + at, left);
  Normals made{};  // while the loads are under way
  if (update.fresh != 0.0f) made = normals(source, group, blockIdx.y);
  Floats<kFour> values = map([=](float value, float by) { return fmaf(update.follow, by, value); }, from.floats(),
                             along.floats());
#pragma unroll
  for (int i = 0; i < kFour; ++i) values[i] = fmaf(update.keep, values[i], update.fresh * made.n[i]);
  write_four<kPacked>(out + at, left, values);
  if (copy != nullptr) write_four<kPacked>(copy + at, left, values);
}

constexpr int kTile = 16;  // tokens of a row that a block turns: with patches two wide, a warp writes 32 neighbours
constexpr int kFinishThreads = 256;
constexpr int kMaxTokenDim = 512;

struct Patches {
  int columns, channels, patch_rows, patch_columns;

  __host__ __device__ int token_dim() const { return channels * patch_rows * patch_columns; }
  // Floats between two tokens in shared memory; odd, so that those of one feature lie in different banks.
  __host__ __device__ int pitch() const { return token_dim() | 1; }
};

// One block per tile of a row of patches (x axis; rows on y, frames on z).
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const float *__restrict__ x, const T *__restrict__ flow, float sigma, Patches patches,
                  T *__restrict__ tokens, float *__restrict__ latents) {
  extern __shared__ float tile[];
  const int width = patches.token_dim(), pitch = patches.pitch();
  const int first = blockIdx.x * kTile, count = min(kTile, patches.columns - first);
  const int64_t row = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
  const int64_t start = (row * patches.columns + first) * width;
  for (int i = threadIdx.x * kFour; i < count * width; i += kFinishThreads * kFour) {
    const int left = count * width - i;
    const Floats<kFour> clean =
        map([=](float from, float along) { return fmaf(-sigma, along, from); },
            read_four<kPacked>(x + start + i, left).floats(), read_four<kPacked>(flow + start + i, left).floats());
    write_four<kPacked>(tokens + start + i, left, clean);
    int to = i / width * pitch + i % width;
#pragma unroll
    for (int k = 0; k < kFour; ++k, ++to) {
      if (!kPacked && (i + k) % width == 0 && k > 0) to += pitch - width;  // four that go on with the next token
      if (kPacked || k < left) tile[to] = clean[k];
    }
  }
  __syncthreads();

  // A warp writes a line: the tile's part of one row of latents of one channel.
  const int lane = threadIdx.x % kWarp, length = count * patches.patch_columns;
  for (int line = threadIdx.x / kWarp; line < patches.channels * patches.patch_rows; line += kFinishThreads / kWarp) {
    const int channel = line / patches.patch_rows, in_patch = line % patches.patch_rows;
    const int64_t plane = int64_t{blockIdx.z} * patches.channels + channel;
    const int64_t latent_row = (plane * gridDim.y + blockIdx.y) * patches.patch_rows + in_patch;
    float *to = latents + (latent_row * patches.columns + first) * patches.patch_columns;
    const float *from = tile + in_patch * patches.patch_columns * patches.channels + channel;
    for (int k = lane; k < length; k += kWarp) {
      to[k] = from[k / patches.patch_columns * pitch + k % patches.patch_columns * patches.channels];
    }
  }
}

bool in_range(int64_t value, int64_t largest) { return value >= 1 && value <= largest; }

}  // namespace

extern "C" int sfrt_denoise(const float *x, const void *flow, int dtype, float follow, float keep, float fresh,
                            const int64_t *seed, const int64_t *first_frame, int64_t step, int64_t frames,
                            int64_t elements, float *out, void *copy, void *stream) {
  return with_float(dtype, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    if (!fits_counters(step, frames, elements)) return SFRT_INVALID_ARGUMENT;
    if (frames == 0 || elements == 0) return 0;
    if (!present(x, out) || (fresh != 0.0f && !present(seed, first_frame))) return SFRT_INVALID_ARGUMENT;
    if (!aligned(sizeof(float), x, out) || !aligned(sizeof(T), flow, copy)) return SFRT_INVALID_ARGUMENT;
    if (!aligned(sizeof(int64_t), seed, first_frame)) return SFRT_INVALID_ARGUMENT;

    const bool packed = elements % kFour == 0 && aligned(kAccess, x, out) && aligned(kFour * sizeof(T), flow, copy);
    const auto kernel = packed ? denoise_kernel<T, true> : denoise_kernel<T, false>;
    kernel<<<grid_of_fours(frames, elements), kFourThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        x, static_cast<const T *>(flow), {follow, keep, fresh}, {seed, first_frame, static_cast<uint32_t>(step)},
        elements, out, static_cast<T *>(copy));
    return static_cast<int>(cudaGetLastError());
  });
}

extern "C" int sfrt_finish(const float *x, const void *flow, int dtype, float sigma, int64_t frames, int64_t rows,
                           int64_t columns, int64_t channels, int64_t patch_rows, int64_t patch_columns, void *tokens,
                           float *latents, void *stream) {
  return with_float(dtype, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    if (frames == 0) return 0;
    if (!in_range(frames, kMaxFrames) || !in_range(rows, kMaxFrames)) return SFRT_INVALID_ARGUMENT;
    if (!in_range(columns, kMaxElements / kMaxTokenDim)) return SFRT_INVALID_ARGUMENT;
    for (const int64_t factor : {channels, patch_rows, patch_columns}) {
      if (!in_range(factor, kMaxTokenDim)) return SFRT_INVALID_ARGUMENT;
    }
    if (channels * patch_rows * patch_columns > kMaxTokenDim) return SFRT_INVALID_ARGUMENT;
    if (!present(x, flow, tokens, latents)) return SFRT_INVALID_ARGUMENT;
    if (!aligned(sizeof(float), x, latents) || !aligned(sizeof(T), flow, tokens)) return SFRT_INVALID_ARGUMENT;

    const Patches patches{static_cast<int>(columns), static_cast<int>(channels), static_cast<int>(patch_rows),
                          static_cast<int>(patch_columns)};
    const dim3 grid(static_cast<unsigned>((columns + kTile - 1) / kTile), static_cast<unsigned>(rows),
                    static_cast<unsigned>(frames));
    const bool packed =
        patches.token_dim() % kFour == 0 && aligned(kAccess, x) && aligned(kFour * sizeof(T), flow, tokens);
    const auto kernel = packed ? finish_kernel<T, true> : finish_kernel<T, false>;
    kernel<<<grid, kFinishThreads, kTile * patches.pitch() * sizeof(float), static_cast<cudaStream_t>(stream)>>>(
        x, static_cast<const T *>(flow), sigma, patches, static_cast<T *>(tokens), latents);
    return static_cast<int>(cudaGetLastError());
  });
}
