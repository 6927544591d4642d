// Counter-based normals, the same on host and device and the same as sfrt/noise.py.
//
// Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Compiles as plain C++ too, so
// that a machine without a GPU can hold it against the Python reference.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SFRT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SFRT_HOST_DEVICE inline
#endif

namespace sfrt {

struct Words {
  uint32_t w[4];
};

struct Normals {
  float n[4];
};

SFRT_HOST_DEVICE Words philox(Words counter, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = static_cast<uint64_t>(0xD2511F53u) * counter.w[0];
    const uint64_t high = static_cast<uint64_t>(0xCD9E8D57u) * counter.w[2];
    counter = {{static_cast<uint32_t>(high >> 32) ^ counter.w[1] ^ k0, static_cast<uint32_t>(high),
                static_cast<uint32_t>(low >> 32) ^ counter.w[3] ^ k1, static_cast<uint32_t>(low)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// A word, read as signed and folded to its magnitude, scaled to [0, 1).
SFRT_HOST_DEVICE float uniform(uint32_t word) {
  const int32_t folded = static_cast<int32_t>(word >> 31 ? ~word : word);
  return static_cast<float>(folded) * 4.6566127342e-10f;
}

// Box-Muller in float32.
SFRT_HOST_DEVICE void normal_pair(uint32_t first, uint32_t second, float *cosine, float *sine) {
  const float radius = sqrtf(-2.0f * logf(fmaxf(uniform(first), 1e-7f)));
  const float angle = 6.283185307179586f * uniform(second);
#ifdef __CUDA_ARCH__
  // sincosf's own question, whose answer spares it most of its code.
  __builtin_assume(!(fabsf(angle) >= 105615.0f));
  sincosf(angle, sine, cosine);
  *cosine *= radius;
  *sine *= radius;
#else
  *cosine = radius * cosf(angle);
  *sine = radius * sinf(angle);
#endif
}

// Elements 4 * group ... 4 * group + 3 of a latent frame at a step.
SFRT_HOST_DEVICE Normals normals(uint64_t seed, uint32_t group, uint32_t frame, uint32_t step) {
  const Words words = philox({{group, frame, step, 0u}}, seed);
  Normals out;
  normal_pair(words.w[0], words.w[1], &out.n[0], &out.n[1]);
  normal_pair(words.w[2], words.w[3], &out.n[2], &out.n[3]);
  return out;
}

// What the counters of one launch have in common. Seed and first frame lie in device memory, as a captured graph finds
// those of its next chunk there; the seed's 64 bits are kept in a signed number, a frame's number below 2^32.
struct Source {
  const int64_t *seed, *first_frame;
  uint32_t step;
};

// As above, of a frame counted from the first.
SFRT_HOST_DEVICE Normals normals(const Source &source, uint32_t group, uint32_t frame) {
  const uint32_t number = static_cast<uint32_t>(*source.first_frame) + frame;
  return normals(static_cast<uint64_t>(*source.seed), group, number, source.step);
}

}  // namespace sfrt
