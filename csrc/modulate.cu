// Gated residual, LayerNorm, scale and shift in one pass: one block per row.
#include "rows.cuh"

namespace {

using namespace sfrt;

template <typename T>
struct Inputs {
  const T *x, *branch, *gate, *scale, *shift;  // branch and gate may be null
  int64_t x_stride, branch_stride;             // in elements
  int width;
  float eps;
};

template <typename T>
struct Outputs {
  T *total;       // null where there is no branch
  void *out;      // T, or e4m3 where there are scales
  float *scales;  // may be null
};

template <typename Values, bool kE4m3, typename T = typename Values::Element>
__global__ void __launch_bounds__(Values::kThreads) modulate_kernel(const Inputs<T> in, const Outputs<T> to) {
  __shared__ float scratch[3][kWarp];
  const int64_t row = blockIdx.x;
  const int width = in.width;

  Values x(width);
  typename Values::Operand branch(width), gate(width), scale(width), shift(width);
  x.read(in.x + row * in.x_stride);
  if (in.branch != nullptr) {
    branch.read(in.branch + row * in.branch_stride);
    if (in.gate != nullptr) {
      gate.read(in.gate);
      x.update([](float value, float added, float times) { return fmaf(added, times, value); }, branch, gate);
    } else {
      x.update([](float value, float added) { return value + added; }, branch);
    }
    x.write(to.total + row * width);
  }
  scale.read(in.scale);
  shift.read(in.shift);

  // What is normed is what the next reader of the sum sees: the rounded values.
  float sum = 0.0f, squares = 0.0f;
  x.each([&](float value) { sum += value; });
  const float mean = __fdividef(block_sum(sum, scratch[0]), width);
  x.each([&](float value) { squares = fmaf(value - mean, value - mean, squares); });
  const float inverse = rsqrtf(__fdividef(block_sum(squares, scratch[1]), width) + in.eps);
  x.update([=](float value, float by, float plus) { return fmaf((value - mean) * inverse, by, plus); }, scale, shift);
  if constexpr (kE4m3) {
    write_quantized(x, static_cast<__nv_fp8_e4m3 *>(to.out) + row * width, to.scales + row, scratch[2]);
  } else {
    x.write(static_cast<T *>(to.out) + row * width);
  }
}

template <typename T>
int queue(const Inputs<T> &in, const Outputs<T> &to, int64_t rows, void *stream) {
  const bool packed = (in.width | in.x_stride | in.branch_stride) % kPack<T> == 0 &&
                      aligned(kAccess, in.x, in.branch, in.gate, in.scale, in.shift, to.total, to.out);
  return with_row<T>(in.width, packed, [&](auto type) {
    using Values = typename decltype(type)::type;
    const auto kernel = to.scales == nullptr ? modulate_kernel<Values, false> : modulate_kernel<Values, true>;
    return launch_rows<Values>(kernel, rows, in.width, stream, in, to);
  });
}

}  // namespace

extern "C" int sfrt_modulate(const void *x, const void *branch, const void *gate, const void *scale, const void *shift,
                             void *total, void *out, float *scales, int64_t rows, int64_t width, int64_t x_stride,
                             int64_t branch_stride, float eps, int dtype, void *stream) {
  return with_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (!fits(rows, width) || x_stride < 0 || branch_stride < 0) return SFRT_INVALID_ARGUMENT;
    if (rows == 0) return 0;
    const bool adds = branch != nullptr;
    if (!present(x, scale, shift, out) || (total != nullptr) != adds || (gate != nullptr && !adds)) {
      return SFRT_INVALID_ARGUMENT;
    }
    const bool in_place = aligned(sizeof(T), x, branch, gate, scale, shift, total, scales == nullptr ? out : nullptr);
    if (!in_place || !aligned(sizeof(float), scales)) return SFRT_INVALID_ARGUMENT;
    const auto of = [](const void *pointer) { return static_cast<const T *>(pointer); };
    const int columns = static_cast<int>(width);
    const Inputs<T> in{of(x), of(branch), of(gate), of(scale), of(shift), x_stride, branch_stride, columns, eps};
    return queue(in, Outputs<T>{static_cast<T *>(total), out, scales}, rows, stream);
  });
}
