// Decoder output to uint8 frames with the channels last. Pixels are planes of rows: three planes, or one in which the
// channels lie side by side already.
#include "rows.cuh"

namespace {

using namespace sfrt;

constexpr int kThreads = 128;
constexpr int kRun = 16;  // neighbouring values of each plane for one thread; as bytes they fill one access

template <typename T>
struct Pixels {
  const T *values;
  int rows, blocks;  // rows of a frame; blocks to a row
  int width;         // values of a row in one plane
  int64_t frame_stride, plane_stride, row_stride, column_stride;
  float scale, shift;

  __device__ __forceinline__ int row() const { return blockIdx.x / blocks; }
  __device__ __forceinline__ int thread_in_row() const { return blockIdx.x % blocks * kThreads + threadIdx.x; }
  __device__ __forceinline__ const T *row_start() const {
    return values + row() / rows * frame_stride + row() % rows * row_stride;
  }

  // 0 to 255 in the lowest byte: adding 1.5 * 2^23 rounds to a whole number, halves to even, and leaves it there.
  __device__ __forceinline__ uint32_t level(float value) const {
    return __float_as_uint(fminf(fmaxf(fmaf(value, scale, shift), 0.0f), 255.0f) + 12582912.0f);
  }
};

template <typename T, int kPlanes>
__global__ void __launch_bounds__(kThreads) runs_kernel(Pixels<T> pixels, uint4 *__restrict__ out) {
  constexpr int kPacks = kRun / kPack<T>;
  const int run = pixels.thread_in_row(), runs = pixels.width / kRun;
  out += int64_t{pixels.row()} * runs * kPlanes;
  uint4 levels[kPlanes] = {};
  if (run < runs) {
    Pack<T, kPack<T>> packs[kPlanes][kPacks];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        packs[plane][p] =
            load<kPack<T>>(pixels.row_start() + plane * pixels.plane_stride + run * kRun + p * kPack<T>);
      }
    }
    Floats<kPack<T>> values[kPlanes][kPacks];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) values[plane][p] = packs[plane][p].floats();
    }
    // Byte b is pixel b / kPlanes of plane b % kPlanes.
    const auto level = [&](int b) {
      const int pixel = b / kPlanes;
      return pixels.level(values[b % kPlanes][pixel / kPack<T>][pixel % kPack<T>]);
    };
    const auto word = [&](int b) {
      const uint32_t low = __byte_perm(level(b), level(b + 1), 0x0040);
      return __byte_perm(low, __byte_perm(level(b + 2), level(b + 3), 0x0040), 0x5410);
    };
#pragma unroll
    for (int q = 0; q < kPlanes; ++q) {
      levels[q] = make_uint4(word(16 * q), word(16 * q + 4), word(16 * q + 8), word(16 * q + 12));
    }
  }
  if constexpr (kPlanes == 1) {
    if (run < runs) out[run] = levels[0];
  } else {
    // A thread's levels are neighbours, and a warp's writes are to be: they change places in shared memory.
    __shared__ uint4 stage[kThreads * kPlanes];
    const int lane = threadIdx.x % kWarp, first = run - lane;
    uint4 *mine = stage + (threadIdx.x - lane) * kPlanes;
#pragma unroll
    for (int q = 0; q < kPlanes; ++q) mine[lane * kPlanes + q] = levels[q];
    __syncwarp();
#pragma unroll
    for (int q = 0; q < kPlanes; ++q) {
      const int at = q * kWarp + lane;
      if (at < (runs - first) * kPlanes) out[first * kPlanes + at] = mine[at];
    }
  }
}

// Any strides and width, a pixel to a thread.
template <typename T, int kPlanes>
__global__ void __launch_bounds__(kThreads) single_kernel(Pixels<T> pixels, uint8_t *__restrict__ out) {
  const int column = pixels.thread_in_row();
  if (column >= pixels.width) return;
  const T *from = pixels.row_start() + column * pixels.column_stride;
  out += (int64_t{pixels.row()} * pixels.width + column) * kPlanes;
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    out[plane] = static_cast<uint8_t>(pixels.level(static_cast<float>(from[plane * pixels.plane_stride])));
  }
}

template <typename T, int kPlanes>
int queue(Pixels<T> pixels, int64_t rows, uint8_t *out, cudaStream_t stream) {
  const int64_t strides = pixels.frame_stride | pixels.plane_stride | pixels.row_stride;
  const bool runs = pixels.column_stride == 1 && pixels.width % kRun == 0 && strides % kPack<T> == 0 &&
                    aligned(kAccess, pixels.values, out);
  const int threads = runs ? pixels.width / kRun : pixels.width;
  pixels.blocks = (threads + kThreads - 1) / kThreads;
  const int64_t blocks = rows * pixels.blocks;
  if (blocks > kMaxRows) return SFRT_INVALID_ARGUMENT;
  if (runs) {
    const auto quads = reinterpret_cast<uint4 *>(out);
    runs_kernel<T, kPlanes><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(pixels, quads);
  } else {
    single_kernel<T, kPlanes><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(pixels, out);
  }
  return static_cast<int>(cudaGetLastError());
}

bool in_range(int64_t value, int64_t smallest) { return value >= smallest && value < int64_t{1} << 30; }

}  // namespace

extern "C" int sfrt_frames(const void *pixels, int dtype, int64_t frames, int64_t planes, int64_t rows, int64_t width,
                           int64_t frame_stride, int64_t plane_stride, int64_t row_stride, int64_t column_stride,
                           float scale, float shift, uint8_t *out, void *stream) {
  return with_float(dtype, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    if (!in_range(frames, 0) || !in_range(rows, 1) || !in_range(width, 1)) return SFRT_INVALID_ARGUMENT;
    if (planes != 1 && planes != 3) return SFRT_INVALID_ARGUMENT;
    if (frames == 0) return 0;
    if (!present(pixels, out) || !aligned(sizeof(T), pixels)) return SFRT_INVALID_ARGUMENT;
    const Pixels<T> walked{static_cast<const T *>(pixels), static_cast<int>(rows), 0, static_cast<int>(width),
                           frame_stride, plane_stride, row_stride, column_stride, scale, shift};
    const auto kernel = planes == 1 ? queue<T, 1> : queue<T, 3>;
    return kernel(walked, frames * rows, out, static_cast<cudaStream_t>(stream));
  });
}
