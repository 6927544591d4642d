/* The C interface of sfrt's kernels: raw pointers, sizes and a stream; no framework headers.
 *
 * Every function queues its work on the stream and returns at once:
 *   0                      queued (or nothing to do)
 *   SFRT_INVALID_ARGUMENT  an argument is impossible; nothing was queued
 *   above zero             the cudaError_t of the launch
 * sfrt_error_string says it in words.
 */
#ifndef SFRT_H
#define SFRT_H

#include <stdint.h>

#define SFRT_API __attribute__((visibility("default")))
#define SFRT_INVALID_ARGUMENT (-1)

/* What an array's elements are. */
typedef enum sfrt_dtype { SFRT_FLOAT32 = 0, SFRT_BFLOAT16 = 1, SFRT_FLOAT16 = 2, SFRT_E4M3 = 3 } sfrt_dtype;

#ifdef __cplusplus
extern "C" {
#endif

/* Standard normals for `frames` latent frames from a first one on, at a step; the values of sfrt/noise.py.
 *
 * out                float32 [frames, elements], dense
 * seed, first_frame  one number each, read when the work runs: the seed's 64 bits, and a frame number below 2^32
 * step               below 2^32
 * frames             at most 65535
 * elements           values of one latent frame, in token layout: tokens x token_dim; at most 2^30
 *
 * A multiple of four elements, at an address that is one of 16 bytes, is fast.
 */
SFRT_API int sfrt_noise(float *out, const int64_t *seed, const int64_t *first_frame, int64_t step, int64_t frames,
                        int64_t elements, void *stream);

/* out = keep * (x + follow * flow) + fresh * normals, the normals those of sfrt_noise.
 *
 * x, out  float32 [frames, elements], dense
 * flow    null, or [frames, elements] of `dtype`, dense
 * copy    null, or `out` once more, of `dtype`
 * dtype   SFRT_FLOAT32, SFRT_BFLOAT16 or SFRT_FLOAT16
 * seed, first_frame  may be null where fresh is 0: then x + follow * flow is all that happens
 */
SFRT_API int sfrt_denoise(const float *x, const void *flow, int dtype, float follow, float keep, float fresh,
                          const int64_t *seed, const int64_t *first_frame, int64_t step, int64_t frames,
                          int64_t elements, float *out, void *copy, void *stream);

/* x - sigma * flow as tokens and as latents.
 *
 * x        float32 [frames, rows, columns, patch_rows, patch_columns, channels], dense: features of a token come last
 * flow     the same of `dtype`, dense
 * tokens   like flow
 * latents  float32 [frames, channels, rows * patch_rows, columns * patch_columns], dense
 * dtype    SFRT_FLOAT32, SFRT_BFLOAT16 or SFRT_FLOAT16
 *
 * Frames and rows are at most 65535, features of a token at most 512.
 */
SFRT_API int sfrt_finish(const float *x, const void *flow, int dtype, float sigma, int64_t frames, int64_t rows,
                         int64_t columns, int64_t channels, int64_t patch_rows, int64_t patch_columns, void *tokens,
                         float *latents, void *stream);

/* out = value * scale + shift, cut to 0 ... 255 and rounded, halves to even.
 *
 * pixels  [frames, planes, rows, width] of `dtype`, strides in elements
 * planes  3, or 1 where the channels of a pixel lie side by side: width then counts values, three to a pixel
 * out     [frames, rows, width, planes], dense
 * dtype   SFRT_FLOAT32, SFRT_BFLOAT16 or SFRT_FLOAT16
 *
 * Rows whose values are dense, with a multiple of 16 of them, and addresses and strides of 16 bytes, are fast.
 */
SFRT_API int sfrt_frames(const void *pixels, int dtype, int64_t frames, int64_t planes, int64_t rows, int64_t width,
                         int64_t frame_stride, int64_t plane_stride, int64_t row_stride, int64_t column_stride,
                         float scale, float shift, uint8_t *out, void *stream);

/* total = x + gate * branch, and out = LayerNorm(total) * scale + shift, the norm over each row of the rounded total.
 *
 * x, branch            device memory, [rows, width] of `dtype`, dense rows their stride apart, in elements
 * gate, scale, shift   [width] of the same dtype; without a gate the branch is added as it is
 * branch, gate, total  null where there is nothing to add: then x itself is normed
 * total, out           [rows, width], dense, of the same dtype
 * scales               null, or float32 [rows]: then out is e4m3, a row being its values times its scale
 * dtype                SFRT_FLOAT32, SFRT_BFLOAT16 or SFRT_FLOAT16
 *
 * A width is at most 16384; a multiple of 16 bytes, with strides and addresses that are too, is fast.
 */
SFRT_API int sfrt_modulate(const void *x, const void *branch, const void *gate, const void *scale, const void *shift,
                           void *total, void *out, float *scales, int64_t rows, int64_t width, int64_t x_stride,
                           int64_t branch_stride, float eps, int dtype, void *stream);

/* Rows as e4m3 values and the scales that make x of them again, a row's largest value being e4m3's: 448.
 *
 * x          device memory, [rows, width] of `dtype`, dense rows x_stride apart, in elements
 * out        e4m3 [rows, width], dense
 * scales     float32 [rows]
 * with_gelu  not 0: tanh-GELU(x), rounded to the dtype, takes the place of x
 * dtype      SFRT_FLOAT32, SFRT_BFLOAT16 or SFRT_FLOAT16
 *
 * A width is at most 16384; a multiple of 16 bytes, with a stride and addresses that are too, is fast.
 */
SFRT_API int sfrt_quantize_rows(const void *x, void *out, float *scales, int64_t rows, int64_t width, int64_t x_stride,
                                int with_gelu, int dtype, void *stream);

/* Self attention's fused product, normed and turned, into queries and a key/value ring.
 *
 * Queries and keys are normed over the whole width = heads x size (RMSNorm), then neighbouring pairs of features are
 * turned by the phases of their token. Frame f of the chunk goes to slot slots[f] of the ring, which is read when the
 * work runs; other slots are left as they are.
 *
 * qkv             device memory, [frames x tokens, 3 x width] of `dtype`, dense rows qkv_stride elements apart
 * norm_q, norm_k  [width] of the same dtype
 * rotary          float32 [frames x tokens, size / 2, 2], cosine and sine
 * slots           int64 [frames], all different, each in [0, ring_slots)
 * q               [frames x tokens, width], dense, of the same dtype
 * k_ring, v_ring  [heads, ring_slots x tokens, size], dense, of the same dtype, or e4m3 where there are scales
 * k_scale, v_scale  both null, or float32 [heads]: what is stored is x / scale, at most e4m3's largest value
 * dtype           SFRT_FLOAT32, SFRT_BFLOAT16 or SFRT_FLOAT16
 *
 * A size is even and at most 256, a width at most 16384, a ring at most 65535 slots; pairs are aligned to their size.
 * Sizes and strides that are multiples of 8, aligned like that, are fast up to a width of 5120.
 */
SFRT_API int sfrt_rolling_kv(const void *qkv, const void *norm_q, const void *norm_k, const float *rotary,
                             const int64_t *slots, void *q, void *k_ring, void *v_ring, const float *k_scale,
                             const float *v_scale, int64_t frames, int64_t tokens, int64_t heads, int64_t size,
                             int64_t ring_slots, int64_t qkv_stride, float eps, int dtype, void *stream);

/* out = RMSNorm(x) * weight over each row.
 *
 * x       device memory, [rows, width] of `dtype`, dense rows `stride` elements apart
 * weight  [width] of the same dtype
 * out     [rows, width], dense, of the same dtype
 * dtype   SFRT_FLOAT32, SFRT_BFLOAT16 or SFRT_FLOAT16
 *
 * A width is at most 16384; a multiple of 16 bytes, with a stride and addresses that are too, is fast.
 */
SFRT_API int sfrt_qk_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t width, int64_t stride,
                          float eps, int dtype, void *stream);

/* A static, English string for what a function above returned. */
SFRT_API const char *sfrt_error_string(int status);

#ifdef __cplusplus
}
#endif

#endif
