// A kernel whose blocks read each other's shared memory, for tests of the emulator: a right one, and the same with a
// mistake each.
#include <cstring>
#include <iterator>
#include <string>

#include "kernels/common/vec.cuh"
#include "kernels/ptx/cluster.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "machine.h"

namespace fused_conv_bn {
namespace {

enum class Mistake {
  none,
  no_barrier,
  block_barrier_alone,
  barrier_not_awaited,
  waits_without_arriving,
  arrives_twice,
  block_ends_early,
  overwritten,
  rank_too_large,
  through_a_pointer,
  static_variable,
  some_threads_do_not_arrive,
};
constexpr const char* kMistakes[] = {"none",
                                     "no_barrier",
                                     "block_barrier_alone",
                                     "barrier_not_awaited",
                                     "waits_without_arriving",
                                     "arrives_twice",
                                     "block_ends_early",
                                     "overwritten",
                                     "rank_too_large",
                                     "through_a_pointer",
                                     "static_variable",
                                     "some_threads_do_not_arrive"};

constexpr int kThreads = 96, kVectors = 192;  // of four floats, that a block brings
constexpr uint32_t kBytes = kVectors * 16;

struct Sum {
  const float* x;
  float* y;
  int ranks;
  Mistake mistake;
};

extern __shared__ __align__(128) unsigned char parts[];

// y: of each cluster the sum of its blocks' numbers. Each block adds some of them, from the shared memory of all.
__global__ void cluster_sum(Sum p) {
  const uint32_t base = shared_address(parts), barrier = base + kBytes;
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_arrive_expect(barrier, kBytes);
    wait_for_previous();
    fetch_bulk(base, p.x + blockIdx.x * kVectors * 4, kBytes, barrier);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < kVectors; i += kThreads) {
    uint4 v = load_shared_4(base + i * 16);
    v.x = __float_as_uint(__uint_as_float(v.x) + rank);
    store_shared(base + i * 16, v);
  }
  switch (p.mistake) {
    case Mistake::no_barrier:
      break;
    case Mistake::block_barrier_alone:
      __syncthreads();
      break;
    case Mistake::barrier_not_awaited:
      cluster_arrive();
      break;
    case Mistake::waits_without_arriving:
      cluster_wait();
      break;
    case Mistake::arrives_twice:
      cluster_arrive();
      cluster_arrive();
      break;
    case Mistake::some_threads_do_not_arrive:
      if (threadIdx.x < 64 || rank == 0) {
        cluster_sync();
      } else {
        __syncthreads();
      }
      break;
    default:
      cluster_sync();
  }
  if (p.mistake == Mistake::through_a_pointer && rank == 1) {
    parts[static_cast<ptrdiff_t>(threadIdx.x) - 232448] = 0;
  }
  if (p.mistake == Mistake::static_variable) {
    __shared__ volatile float values[kThreads];
    values[threadIdx.x] = 1;
  }
  const int vectors = kVectors / p.ranks, first = rank * vectors;
  for (int i = first + threadIdx.x; i < first + vectors; i += kThreads) {
    float4 sum{};
    for (int other = 0; other < p.ranks; ++other) {
      const float4 v = load_cluster_4(base + i * 16, p.mistake == Mistake::rank_too_large ? other + 1 : other);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    const uint4 bits{__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z), __float_as_uint(sum.w)};
    store_words(p.y + (blockIdx.x / p.ranks * kVectors + i) * 4, bits);
  }
  if (p.mistake == Mistake::overwritten) {
    store_shared(base + threadIdx.x * 16, uint32_t{0});
  }
  if (p.mistake != Mistake::block_ends_early && p.mistake != Mistake::barrier_not_awaited) {
    cluster_sync();
  }
}

}  // namespace

// x: numbers of so many blocks, 768 each. y: their sums by cluster, the rank added to every fourth number of a block.
extern "C" const char* emulated_cluster_sum(const float* x, float* y, int blocks, int ranks, const char* mistake,
                                            uint64_t seed) {
  static std::string message;
  emulated::begin(seed);
  emulated::allow(x, static_cast<size_t>(blocks) * kBytes);
  emulated::allow(y, static_cast<size_t>(blocks / ranks) * kBytes);
  Sum p{x, y, ranks, Mistake::none};
  for (size_t i = 0; i < std::size(kMistakes); ++i) {
    if (std::strcmp(kMistakes[i], mistake) == 0) {
      p.mistake = static_cast<Mistake>(i);
    }
  }
  if (launch_cluster(cluster_sum, dim3(blocks), ranks, kThreads, kBytes + 8, true, nullptr, p) == cudaSuccess) {
    return nullptr;
  }
  message = emulated::problem();
  return message.c_str();
}

}  // namespace fused_conv_bn
