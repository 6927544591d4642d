// RMSNorm of rows: one block per row.
#include "rows.cuh"

namespace {

using namespace sfrt;

template <typename Values, typename T = typename Values::Element>
__global__ void __launch_bounds__(Values::kThreads) qk_norm_kernel(const T *x, const T *weight, T *out, int64_t stride,
                                                                   int width, float eps) {
  __shared__ float scratch[kWarp];
  const int64_t row = blockIdx.x;
  Values values(width);
  typename Values::Operand weights(width);
  values.read(x + row * stride);
  weights.read(weight);
  float squares = 0.0f;
  values.each([&](float value) { squares = fmaf(value, value, squares); });
  const float by = rsqrtf(__fdividef(block_sum(squares, scratch), width) + eps);
  values.update([by](float value, float weight) { return value * by * weight; }, weights);
  values.write(out + row * width);
}

}  // namespace

extern "C" int sfrt_qk_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t width, int64_t stride,
                            float eps, int dtype, void *stream) {
  return with_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (!fits(rows, width) || stride < 0) return SFRT_INVALID_ARGUMENT;
    if (rows == 0) return 0;
    if (!present(x, weight, out) || !aligned(sizeof(T), x, weight, out)) return SFRT_INVALID_ARGUMENT;
    const bool packed = (width | stride) % kPack<T> == 0 && aligned(kAccess, x, weight, out);
    return with_row<T>(width, packed, [&](auto kind) {
      using Values = typename decltype(kind)::type;
      const auto of = [](const void *pointer) { return static_cast<const T *>(pointer); };
      const int columns = static_cast<int>(width);
      return launch_rows<Values>(qk_norm_kernel<Values>, rows, width, stream, of(x), of(weight), static_cast<T *>(out),
                                 stride, columns, eps);
    });
  });
}
