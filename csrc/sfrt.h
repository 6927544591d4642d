/* The C interface of sfrt's kernels: raw pointers, sizes and a stream; no framework headers.
 *
 * Every function queues its work on the stream and returns at once:
 *   0                      queued (or nothing to do)
 *   SFRT_INVALID_ARGUMENT  an argument is impossible; nothing was queued
 *   above zero             the cudaError_t of the launch
 * sfrt_error_string says it in words.
 *
 * No backend of sfrt calls these functions yet; their tests do.
 */
#ifndef SFRT_H
#define SFRT_H

#include <stdint.h>

#define SFRT_API __attribute__((visibility("default")))
#define SFRT_INVALID_ARGUMENT (-1)

#ifdef __cplusplus
extern "C" {
#endif

/* Standard normals for `frames` latent frames from `first_frame` on, at `steps` steps from `first_step` on.
 *
 * out      device memory, float32 [steps, frames, elements], contiguous, aligned to 4 bytes (16 is faster)
 * elements values in one latent frame, in token layout: tokens x token_dim
 * stream   a cudaStream_t; null is the default stream
 *
 * Frame numbers, step numbers and elements / 4 are 32-bit words of the generator's counter, so each must fit one; a
 * launch takes at most 65535 frames and as many steps. The values are those of chunk_noise in sfrt/noise.py.
 */
SFRT_API int sfrt_noise(float *out, uint64_t seed, int64_t first_frame, int64_t frames, int64_t first_step,
                        int64_t steps, int64_t elements, void *stream);

/* A static, English string for what a function above returned. */
SFRT_API const char *sfrt_error_string(int status);

#ifdef __cplusplus
}
#endif

#endif
