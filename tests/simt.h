// CUDA's threads as fibers on one CPU thread, so that csrc/ runs where there is no GPU: block after block, and in a
// block from barrier to barrier in an order that is shuffled anew each time, so that a missing barrier shows.
//
// It stands in for what a kernel takes from the compiler: built-in variables, barriers, shuffles, intrinsics. Memory is
// the CPU's; shared memory is full of NaN when a block begins.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <vector>

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
constexpr size_t kShared = 232448;  // bytes a block may have on the largest GPU

// Threads that wait for each other: a block, or a warp.
struct Group {
  int members = 0, arrived = 0;
  long meetings = 0;

  void settle() {
    if (arrived == members) arrived = 0, ++meetings;
  }
  void leave() {
    --members;
    if (members > 0) settle();
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned thread = 0;
  bool done = false;
  const Group *awaits = nullptr;
  long meeting = 0;

  bool ready() const { return !done && (awaits == nullptr || awaits->meetings > meeting); }
};

struct Block {
  dim3 grid, shape;
  uint3 index;
  std::function<void()> kernel;
  std::vector<Fiber> fibers;
  std::vector<Group> warps;
  Group all;
  std::vector<uint64_t> lanes;  // what each thread holds out to its warp
  std::set<void *> fresh;       // shared arrays that this block has begun with
  ucontext_t scheduler;
  Fiber *running = nullptr;
};

inline Block *block = nullptr;
alignas(16) inline unsigned char dynamic_shared[kShared];

inline Group &warp() { return block->warps[block->running->thread / kWarp]; }

inline void pause() {
  Fiber *self = block->running;
  swapcontext(&self->context, &block->scheduler);
}

inline void meet(Group &group) {
  block->running->awaits = &group;
  block->running->meeting = group.meetings;
  ++group.arrived;
  group.settle();
  pause();
}

inline void begin() {
  block->kernel();
  block->running->done = true;
  warp().leave();
  block->all.leave();
  pause();
}

inline void run() {
  static std::mt19937 random{7};
  const unsigned threads = block->shape.x * block->shape.y * block->shape.z;
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  block->fibers = std::vector<Fiber>(threads);
  block->warps.assign(warps, Group{});
  block->all = Group{static_cast<int>(threads)};
  block->lanes.assign(warps * kWarp, 0);
  block->fresh.clear();
  memset(dynamic_shared, 0xff, kShared);
  std::vector<Fiber *> order;
  for (Fiber &fiber : block->fibers) {
    fiber.thread = order.size();
    ++block->warps[fiber.thread / kWarp].members;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, begin, 0);
    order.push_back(&fiber);
  }
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (Fiber *fiber : order) {
      if (!fiber->ready()) continue;
      moved = true;
      block->running = fiber;
      swapcontext(&block->scheduler, &fiber->context);
    }
    if (!moved) {
      fprintf(stderr, "simt: threads wait for others that never come\n");
      abort();
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber *fiber) { return fiber->done; }), order.end());
  }
}

// What kernel<<<grid, shape, shared, stream>>>(...) becomes.
template <typename Kernel>
void launch(dim3 grid, dim3 shape, size_t, void *, Kernel kernel) {
  Block here;
  here.grid = grid;
  here.shape = shape;
  here.kernel = kernel;
  block = &here;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        here.index = uint3{x, y, z};
        run();
      }
    }
  }
  block = nullptr;
}

// A shared array is full of NaN for the first thread of a block that comes by.
template <typename Array>
void begin_with_nan(Array &array) {
  if (block->fresh.insert(&array).second) memset(&array, 0xff, sizeof array);
}

inline uint3 thread_index() {
  const unsigned thread = block->running->thread, x = block->shape.x, y = block->shape.y;
  return uint3{thread % x, thread / x % y, thread / x / y};
}

template <typename T>
T from_lane(T value, int lane) {
  const unsigned thread = block->running->thread;
  memcpy(&block->lanes[thread], &value, sizeof value);
  meet(warp());
  T found;
  memcpy(&found, &block->lanes[thread / kWarp * kWarp + lane], sizeof found);
  meet(warp());
  return found;
}

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block->index)
#define blockDim (simt::block->shape)
#define gridDim (simt::block->grid)
#undef __launch_bounds__
#define __launch_bounds__(...)

using std::max;
using std::min;

inline void __syncthreads() { simt::meet(simt::block->all); }
inline void __syncwarp() { simt::meet(simt::warp()); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return simt::from_lane(value, simt::block->running->thread % simt::kWarp ^ lanes);
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return simt::from_lane(value, lane);
}

// Single instructions, spelled as calls of their names.
inline float ex2(float x) { return exp2f(x); }
inline float rcp(float x) { return 1.0f / x; }

inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline float __uint_as_float(uint32_t word) {
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return word;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) made |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return made;
}

template <typename... Arguments>
cudaError_t cudaFuncSetAttribute(void (*)(Arguments...), cudaFuncAttribute, int bytes) {
  return static_cast<size_t>(bytes) <= simt::kShared ? cudaSuccess : cudaErrorInvalidValue;
}

extern "C" {
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "an error of the emulated device"; }
}
