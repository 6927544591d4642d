// Norm, rotary phases and the way into the ring in one pass: one block per token.
#include "rows.cuh"

namespace sfrt {

// Two e4m3 values: half a word.
template <>
struct Pack<__nv_fp8_e4m3, 2> {
  uint16_t pair;

  static __device__ __forceinline__ Pack of(const Floats<2> &floats) {
    return {__nv_cvt_float2_to_fp8x2(make_float2(floats[0], floats[1]), __NV_SATFINITE, __NV_E4M3)};
  }
};

}  // namespace sfrt

namespace {

using namespace sfrt;

constexpr int kHeld = 8;          // features of a thread where a whole row fits a block's registers
constexpr int kRowThreads = 640;  // so that a row of 5120 does
constexpr int kPairThreads = 256;
constexpr int64_t kMaxSize = 256;     // features of a head
constexpr int64_t kMaxSlots = 65535;  // frames ride on the grid's y axis

template <typename Stored>
constexpr bool kScaled = sizeof(Stored) == 1;

template <typename T, typename Stored>
struct Call {
  const T *qkv, *norm_q, *norm_k;
  const float *rotary;
  const int64_t *slots;
  T *q;
  Stored *k_ring, *v_ring;
  const float *k_scale, *v_scale;  // null unless the rings are e4m3
  int64_t stride;                  // of the rows of qkv, in elements
  int64_t places;                  // tokens that the ring has room for
  int width, size;                 // of a row of q, and of a head
  float eps;
};

// Neighbouring features of one head of a token, and the cosine and sine of every pair.
template <typename T, int kCount>
struct Piece {
  int head, feature;
  Pack<T, kCount> q, k, v;
  Pack<float, kCount> phases;

  template <typename Stored>
  static __device__ __forceinline__ Piece read(const Call<T, Stored> &call, int64_t row, int column) {
    const int head = column / call.size, feature = column - head * call.size;
    const T *from = call.qkv + row * call.stride + column;
    return {head,
            feature,
            load<kCount>(from),
            load<kCount>(from + call.width),
            load<kCount>(from + 2 * call.width),
            load<kCount>(call.rotary + row * call.size + feature)};
  }
};

template <int kCount>
__device__ __forceinline__ float squares(const Floats<kCount> &x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum = fmaf(x[i], x[i], sum);
  return sum;
}

template <int kCount>
__device__ __forceinline__ Floats<kCount> turned(const Floats<kCount> &x, const Floats<kCount> &phases) {
  Floats<kCount> made;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    made[i] = x[i] * phases[i] - x[i + 1] * phases[i + 1];
    made[i + 1] = x[i] * phases[i + 1] + x[i + 1] * phases[i];
  }
  return made;
}

template <int kCount, typename Stored>
__device__ __forceinline__ void keep(Stored *to, const Floats<kCount> &x, const float *scale) {
  if constexpr (kScaled<Stored>) {
    const float inverse = __fdividef(1.0f, *scale);
    store(to, Pack<Stored, kCount>::of(map([=](float value) { return value * inverse; }, x)));
  } else {
    store(to, Pack<Stored, kCount>::of(x));
  }
}

// Queries out, keys and values to their slot; q_by and k_by are what RMSNorm multiplies the token's rows by. Its weights
// are in the cache, of all blocks, and need not be read ahead.
template <typename T, typename Stored, int kCount>
__device__ __forceinline__ void write(const Call<T, Stored> &call, int64_t row, int64_t slot,
                                      const Piece<T, kCount> &piece, float q_by, float k_by) {
  const int column = piece.head * call.size + piece.feature;
  const int64_t place = piece.head * call.places + slot * gridDim.x + blockIdx.x;
  const int64_t target = place * call.size + piece.feature;
  const Floats<kCount> phases = piece.phases.floats();
  const auto normed = [&](const Pack<T, kCount> &x, const T *weights, float by) {
    return map([by](float value, float weight) { return value * by * weight; }, x.floats(),
               load<kCount>(weights + column).floats());
  };
  store(call.q + row * call.width + column, Pack<T, kCount>::of(turned(normed(piece.q, call.norm_q, q_by), phases)));
  keep(call.k_ring + target, turned(normed(piece.k, call.norm_k, k_by), phases), call.k_scale + piece.head);
  keep(call.v_ring + target, piece.v.floats(), call.v_scale + piece.head);
}

template <typename T, typename Stored>
__device__ __forceinline__ float inverse_norm(const Call<T, Stored> &call, float squares, float *scratch) {
  return rsqrtf(__fdividef(block_sum(squares, scratch), call.width) + call.eps);
}

// A row in the registers of a block, kHeld features in a thread.
template <typename T, typename Stored>
__global__ void __launch_bounds__(kRowThreads, 4 / sizeof(T)) rolling_kv_row(const Call<T, Stored> call) {
  __shared__ float scratch[2][kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int column = kHeld * threadIdx.x;
  const bool inside = column < call.width;
  const auto piece = inside ? Piece<T, kHeld>::read(call, row, column) : Piece<T, kHeld>{};
  const int64_t slot = call.slots[blockIdx.y];
  const float q_by = inverse_norm(call, squares(piece.q.floats()), scratch[0]);
  const float k_by = inverse_norm(call, squares(piece.k.floats()), scratch[1]);
  if (inside) write(call, row, slot, piece, q_by, k_by);
}

// A row of any width, pair by pair: read once for the norms and once more for the rest.
template <typename T, typename Stored>
__global__ void __launch_bounds__(kPairThreads) rolling_kv_pairs(const Call<T, Stored> call) {
  __shared__ float scratch[2][kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  float q_squares = 0.0f, k_squares = 0.0f;
  for (int column = 2 * threadIdx.x; column < call.width; column += 2 * kPairThreads) {
    const T *from = call.qkv + row * call.stride + column;
    q_squares += squares(load<2>(from).floats());
    k_squares += squares(load<2>(from + call.width).floats());
  }
  const int64_t slot = call.slots[blockIdx.y];
  const float q_by = inverse_norm(call, q_squares, scratch[0]);
  const float k_by = inverse_norm(call, k_squares, scratch[1]);
  for (int column = 2 * threadIdx.x; column < call.width; column += 2 * kPairThreads) {
    write(call, row, slot, Piece<T, 2>::read(call, row, column), q_by, k_by);
  }
}

// Whether packs of `count` features lie at multiples of their size.
template <typename T, typename Stored>
bool packed(const Call<T, Stored> &call, int count) {
  return call.size % count == 0 && call.stride % count == 0 &&
         aligned(count * sizeof(T), call.qkv, call.norm_q, call.norm_k, call.q) &&
         aligned(count * sizeof(Stored), call.k_ring, call.v_ring) && aligned(count * sizeof(float), call.rotary);
}

template <typename T, typename Stored>
int queue(const Call<T, Stored> &call, dim3 grid, cudaStream_t stream) {
  if (!packed(call, 2)) return SFRT_INVALID_ARGUMENT;
  if (packed(call, kHeld) && call.width <= kHeld * kRowThreads) {
    const int warps = (call.width + kHeld * kWarp - 1) / (kHeld * kWarp);
    rolling_kv_row<<<grid, warps * kWarp, 0, stream>>>(call);
  } else {
    rolling_kv_pairs<<<grid, kPairThreads, 0, stream>>>(call);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

extern "C" int sfrt_rolling_kv(const void *qkv, const void *norm_q, const void *norm_k, const float *rotary,
                               const int64_t *slots, void *q, void *k_ring, void *v_ring, const float *k_scale,
                               const float *v_scale, int64_t frames, int64_t tokens, int64_t heads, int64_t size,
                               int64_t ring_slots, int64_t qkv_stride, float eps, int dtype, void *stream) {
  return with_float(dtype, [&](auto type) -> int {
    using T = typename decltype(type)::type;
    if (size <= 0 || size > kMaxSize || heads <= 0 || heads > kMaxWidth / size) return SFRT_INVALID_ARGUMENT;
    if (tokens < 0 || tokens > kMaxRows || frames < 0 || frames > ring_slots || ring_slots > kMaxSlots)
      return SFRT_INVALID_ARGUMENT;
    if (qkv_stride < 0 || (k_scale == nullptr) != (v_scale == nullptr)) return SFRT_INVALID_ARGUMENT;
    if (frames == 0 || tokens == 0) return 0;
    if (!present(qkv, norm_q, norm_k, rotary, slots, q, k_ring, v_ring)) return SFRT_INVALID_ARGUMENT;
    if (!aligned(sizeof(int64_t), slots) || !aligned(sizeof(float), k_scale, v_scale)) return SFRT_INVALID_ARGUMENT;

    const auto of = [](const void *pointer) { return static_cast<const T *>(pointer); };
    const auto run = [&](auto stored) {
      using Stored = typename decltype(stored)::type;
      const Call<T, Stored> call{of(qkv), of(norm_q), of(norm_k), rotary, slots, static_cast<T *>(q),
                                 static_cast<Stored *>(k_ring), static_cast<Stored *>(v_ring), k_scale, v_scale,
                                 qkv_stride, ring_slots * tokens, static_cast<int>(heads * size),
                                 static_cast<int>(size), eps};
      const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(frames));
      return queue(call, grid, static_cast<cudaStream_t>(stream));
    };
    return k_scale == nullptr ? run(Type<T>{}) : run(Type<__nv_fp8_e4m3>{});
  });
}
