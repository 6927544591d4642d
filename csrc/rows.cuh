// What kernels over rows share: elements as floats, packs of neighbouring elements that move as one access, sums and
// maxima over a block, a row held by a block, and the choice of a kernel by dtype and width.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "sfrt.h"

namespace sfrt {

constexpr int kWarp = 32;
constexpr int kAccess = 16;  // bytes: the widest load and store of every GPU we build for
constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestScale = 1.17549435e-38f;  // float32's smallest normal number: a row of zeros has a scale too

// Four bytes of elements as floats, and floats as four bytes of elements: rounded to nearest, ties to even; what is
// beyond e4m3's range becomes its largest value.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static __device__ __forceinline__ void read(uint32_t word, float *to) { to[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t write(const float *from) { return __float_as_uint(from[0]); }
};

template <>
struct Word<__nv_bfloat16> {
  static __device__ __forceinline__ void read(uint32_t word, float *to) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t write(const float *from) {
    const __nv_bfloat162_raw pair = __floats2bfloat162_rn(from[0], from[1]);
    return pair.x | static_cast<uint32_t>(pair.y) << 16;
  }
};

template <>
struct Word<__half> {
  static __device__ __forceinline__ void read(uint32_t word, float *to) {
    __half2_raw raw;
    raw.x = static_cast<unsigned short>(word);
    raw.y = static_cast<unsigned short>(word >> 16);
    const float2 pair = __half22float2(raw);
    to[0] = pair.x;
    to[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t write(const float *from) {
    const __half2_raw pair = __floats2half2_rn(from[0], from[1]);
    return pair.x | static_cast<uint32_t>(pair.y) << 16;
  }
};

template <>
struct Word<__nv_fp8_e4m3> {
  static __device__ __forceinline__ uint32_t write(const float *from) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(from[0], from[1]), __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(from[2], from[3]), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
  }
};

template <int kCount>
struct Floats {
  float values[kCount];

  __device__ __forceinline__ float operator[](int i) const { return values[i]; }
  __device__ __forceinline__ float &operator[](int i) { return values[i]; }
};

// change(element of the first, of the second ...) in each place.
template <int kCount, typename Change, typename... More>
__device__ __forceinline__ Floats<kCount> map(Change change, const Floats<kCount> &first, const More &...more) {
  Floats<kCount> made;
#pragma unroll
  for (int i = 0; i < kCount; ++i) made[i] = change(first[i], more[i]...);
  return made;
}

// kCount neighbouring elements, read or written at once, and kept as they are in memory until they are floats: so many
// loads can be under way. Their address must be a multiple of their size together.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  static constexpr int kWords = sizeof(T) * kCount / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ Floats<kCount> floats() const {
    Floats<kCount> found;
#pragma unroll
    for (int w = 0; w < kWords; ++w) Word<T>::read(words[w], found.values + w * (kCount / kWords));
    return found;
  }

  static __device__ __forceinline__ Pack of(const Floats<kCount> &floats) {
    Pack made;
#pragma unroll
    for (int w = 0; w < kWords; ++w) made.words[w] = Word<T>::write(floats.values + w * (kCount / kWords));
    return made;
  }
};

template <typename T>
constexpr int kPack = kAccess / static_cast<int>(sizeof(T));  // elements that fill one access

template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> load(const T *from) {
  return *reinterpret_cast<const Pack<T, kCount> *>(from);
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T *to, const Pack<T, kCount> &pack) {
  *reinterpret_cast<Pack<T, kCount> *>(to) = pack;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

// Over a block of whole warps, for every thread the same. `scratch` is kWarp floats of shared memory that nothing else
// in the kernel uses, another reduction neither: so one barrier is enough.
__device__ __forceinline__ float block_sum(float value, float *scratch) {
  const int lane = threadIdx.x % kWarp;
  value = warp_sum(value);
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(lane < blockDim.x / kWarp ? scratch[lane] : 0.0f);
}

// Likewise, of values not below zero.
__device__ __forceinline__ float block_max(float value, float *scratch) {
  const int lane = threadIdx.x % kWarp;
  value = warp_max(value);
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_max(lane < blockDim.x / kWarp ? scratch[lane] : 0.0f);
}

// A row in the registers of a block of at most kThreads threads: kPacks packs in each, a block's width apart.
template <typename T, int kPacks, int kThreads_>
struct PackedRow {
  using Element = T;
  using Operand = PackedRow;  // a row that this one is changed by: read ahead
  static constexpr int kThreads = kThreads_, kCount = kPack<T>;

  Pack<T, kCount> packs[kPacks];
  const int width;

  explicit __device__ __forceinline__ PackedRow(int width) : width(width) {}

  static __device__ __forceinline__ int column(int pack) {
    return static_cast<int>(pack * blockDim.x + threadIdx.x) * kCount;
  }

  __device__ __forceinline__ void read(const T *from) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) packs[p] = column(p) < width ? load<kCount>(from + column(p)) : Pack<T, kCount>{};
  }

  // visit(element) for each element this thread holds.
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (column(p) >= width) continue;
      const Floats<kCount> values = packs[p].floats();
#pragma unroll
      for (int i = 0; i < kCount; ++i) visit(values[i]);
    }
  }

  // Each element becomes change(itself, those in its place in other rows ...), rounded to T.
  template <typename Change, typename... Others>
  __device__ __forceinline__ void update(Change change, const Others &...others) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      packs[p] = Pack<T, kCount>::of(map(change, packs[p].floats(), others.packs[p].floats()...));
    }
  }

  __device__ __forceinline__ void write(T *to) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (column(p) < width) store(to + column(p), packs[p]);
    }
  }

  // change(element) for each, rounded to e4m3; what is beyond its range becomes its largest value.
  template <typename Change>
  __device__ __forceinline__ void write_e4m3(__nv_fp8_e4m3 *to, Change change) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (column(p) < width) store(to + column(p), Pack<__nv_fp8_e4m3, kCount>::of(map(change, packs[p].floats())));
    }
  }

  static unsigned threads(int64_t width) {
    const int64_t needed = (width + kCount * kPacks - 1) / (kCount * kPacks);
    return static_cast<unsigned>((needed + kWarp - 1) / kWarp * kWarp);
  }
  static size_t shared_bytes(int64_t) { return 0; }
};

// A row of any width at any address, in shared memory, an element at a time: each thread knows its own columns only.
template <typename T>
struct LooseRow {
  using Element = T;
  static constexpr int kThreads = 256;

  struct Operand {
    const T *from;
    explicit __device__ __forceinline__ Operand(int) {}
    __device__ __forceinline__ void read(const T *row) { from = row; }
  };

  T *const values;
  const int width;

  explicit __device__ __forceinline__ LooseRow(int width) : values(storage()), width(width) {}

  __device__ __forceinline__ void read(const T *from) {
    for (int c = threadIdx.x; c < width; c += blockDim.x) values[c] = from[c];
  }

  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    for (int c = threadIdx.x; c < width; c += blockDim.x) visit(static_cast<float>(values[c]));
  }

  template <typename Change, typename... Others>
  __device__ __forceinline__ void update(Change change, const Others &...others) {
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
      values[c] = static_cast<T>(change(static_cast<float>(values[c]), static_cast<float>(others.from[c])...));
    }
  }

  __device__ __forceinline__ void write(T *to) const {
    for (int c = threadIdx.x; c < width; c += blockDim.x) to[c] = values[c];
  }

  template <typename Change>
  __device__ __forceinline__ void write_e4m3(__nv_fp8_e4m3 *to, Change change) const {
    for (int c = threadIdx.x; c < width; c += blockDim.x) to[c] = __nv_fp8_e4m3(change(static_cast<float>(values[c])));
  }

  static unsigned threads(int64_t) { return kThreads; }
  static size_t shared_bytes(int64_t width) { return static_cast<size_t>(width) * sizeof(T); }

 private:
  static __device__ __forceinline__ T *storage() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return reinterpret_cast<T *>(bytes);
  }
};

// The row as e4m3 values and their scale: values * scale is the row, and its largest element stands at kLargestE4m3.
template <typename Values>
__device__ __forceinline__ void write_quantized(const Values &row, __nv_fp8_e4m3 *to, float *scale, float *scratch) {
  float largest = 0.0f;
  row.each([&](float value) { largest = fmaxf(largest, fabsf(value)); });
  const float step = fmaxf(block_max(largest, scratch) * (1.0f / kLargestE4m3), kSmallestScale);
  const float inverse = __fdividef(1.0f, step);
  row.write_e4m3(to, [=](float value) { return value * inverse; });
  if (threadIdx.x == 0) *scale = step;
}

// On the host.

template <typename T>
struct Type {
  using type = T;
};

// visit(Type<T>{}) for the type of a dtype code, or SFRT_INVALID_ARGUMENT for one that is no float of 16 or 32 bits.
template <typename Visit>
int with_float(int dtype, Visit visit) {
  switch (dtype) {
    case SFRT_FLOAT32: return visit(Type<float>{});
    case SFRT_BFLOAT16: return visit(Type<__nv_bfloat16>{});
    case SFRT_FLOAT16: return visit(Type<__half>{});
    default: return SFRT_INVALID_ARGUMENT;
  }
}

// Whether these addresses are all multiples of `bytes`; a null pointer always is.
template <typename... Pointers>
bool aligned(uintptr_t bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

// Whether none of these is null.
template <typename... Pointers>
bool present(Pointers... pointers) {
  return ((pointers != nullptr) && ...);
}

constexpr int64_t kMaxWidth = 16384;
constexpr int64_t kMaxRows = 0x7fffffff;  // blocks of one launch

inline bool fits(int64_t rows, int64_t width) {
  return rows >= 0 && rows <= kMaxRows && width > 0 && width <= kMaxWidth;
}

// visit(Type<row>{}) for the kind of row that holds `width` elements, at most kMaxWidth: packs where every address and
// stride allows them, and few elements per thread where few will do, so that many blocks fit a multiprocessor.
template <typename T, typename Visit>
int with_row(int64_t width, bool packed, Visit visit) {
  constexpr int kCount = kPack<T>;
  if (!packed) return visit(Type<LooseRow<T>>{});
  if (width <= 8 * 256) return visit(Type<PackedRow<T, 8 / kCount, 256>>{});
  if (width <= 16 * 512) return visit(Type<PackedRow<T, 16 / kCount, 512>>{});
  return visit(Type<PackedRow<T, 32 / kCount, 512>>{});
}

// Queue a kernel with one block for each of `rows` rows, held as Values: 0, or the launch's error.
template <typename Values, typename... Arguments>
int launch_rows(void (*kernel)(Arguments...), int64_t rows, int64_t width, void *stream, Arguments... arguments) {
  const size_t shared = Values::shared_bytes(width);
  if (shared > 40 * 1024) {  // with its scratch it may need more than the 48 KiB that a kernel gets unasked
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t status = cudaFuncSetAttribute(kernel, limit, static_cast<int>(shared));
    if (status != cudaSuccess) return static_cast<int>(status);
  }
  const auto queue = static_cast<cudaStream_t>(stream);
  kernel<<<static_cast<unsigned>(rows), Values::threads(width), shared, queue>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace sfrt
