// Rows as e4m3 values and scales, with or without the activation in front, in one pass: one block per row.
#include "rows.cuh"

namespace {

using namespace sfrt;

// One instruction each, numbers below float32's normal ones being zeros: here they would vanish against 1.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + exp(-2 u)): nothing cancels, and where exp
// overflows the quotient is zero, as it must.
__device__ __forceinline__ float gelu(float x) {
  constexpr float kLinear = -2.302208198f;  // -2 sqrt(2 / pi) log2(e)
  constexpr float kCubic = 0.044715f * kLinear;
  return x * reciprocal_approximate(1.0f + exp2_approximate(x * fmaf(kCubic, x * x, kLinear)));
}

template <typename Values, bool kGelu, typename T = typename Values::Element>
__global__ void __launch_bounds__(Values::kThreads) quantize_kernel(const T *x, __nv_fp8_e4m3 *out, float *scales,
                                                                    int64_t stride, int width) {
  __shared__ float scratch[kWarp];
  const int64_t row = blockIdx.x;
  Values values(width);
  values.read(x + row * stride);
  if constexpr (kGelu) values.update([](float value) { return gelu(value); });
  write_quantized(values, out + row * width, scales + row, scratch);
}

}  // namespace

extern "C" int sfrt_quantize_rows(const void *x, void *out, float *scales, int64_t rows, int64_t width,
                                  int64_t x_stride, int with_gelu, int dtype, void *stream) {
  return with_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (!fits(rows, width) || x_stride < 0) return SFRT_INVALID_ARGUMENT;
    if (rows == 0) return 0;
    if (!present(x, out, scales) || !aligned(sizeof(T), x) || !aligned(sizeof(float), scales)) {
      return SFRT_INVALID_ARGUMENT;
    }
    const bool packed = (width | x_stride) % kPack<T> == 0 && aligned(kAccess, x, out);
    return with_row<T>(width, packed, [&](auto kind) {
      using Values = typename decltype(kind)::type;
      const auto kernel = with_gelu ? quantize_kernel<Values, true> : quantize_kernel<Values, false>;
      const auto from = static_cast<const T *>(x);
      const auto to = static_cast<__nv_fp8_e4m3 *>(out);
      return launch_rows<Values>(kernel, rows, width, stream, from, to, scales, x_stride, static_cast<int>(width));
    });
  });
}
