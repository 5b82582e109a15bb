// Kernels that are wrong, each in one way, for tests of the emulator: it has to say so. And the same without the mistake.
#include <cstring>
#include <vector>

#include "kernels/ptx/cp_async.cuh"
#include "kernels/ptx/launch.cuh"
#include "kernels/ptx/mbarrier.cuh"
#include "kernels/ptx/shared.cuh"
#include "kernels/ptx/tma.cuh"
#include "kernels/ptx/wgmma.cuh"
#include "machine.h"

namespace fused_conv_bn {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kBytes = 8192;

extern __shared__ __align__(128) unsigned char memory[];

__device__ uint32_t base() { return shared_address(memory); }
__device__ uint32_t own() { return base() + 16 * threadIdx.x; }
__device__ uint32_t barrier() { return base() + 4096; }

struct Arguments {
  float* data;  // a float4 for each thread
  float* few;   // five
};

using Kernel = void (*)(Arguments);

// ---- right ----

__global__ void through_shared_memory(Arguments a) {
  wait_for_previous();
  store_shared(own(), load_words(a.data + 4 * threadIdx.x));
  __syncthreads();
  const uint32_t other = base() + 16 * (threadIdx.x ^ 37);
  store_words(a.data + 4 * threadIdx.x, load_shared_4(other));
}
__global__ void by_copies(Arguments a) {
  if (threadIdx.x == 0) {
    barrier_init(barrier(), 1);
    wait_for_previous();  // for all
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_expect(barrier(), 16 * kThreads);
    fetch_bulk(base(), a.data, 16 * kThreads, barrier());
  }
  barrier_wait(barrier(), 0);
  const uint4 v = load_shared_4(base() + 16 * (threadIdx.x ^ 37));
  __syncthreads();
  store_shared(own(), v);
  fence_async();
  __syncthreads();
  if (threadIdx.x == 32) {
    copy_bulk(a.data, base(), 16 * kThreads);
    copy_bulk_commit();
    copy_bulk_wait_read();
  }
}

// Two groups, of which the first has been read where one is left.
__device__ void overwrite_behind_one_of_two(Arguments a, uint32_t offset) {
  wait_for_previous();
  const uint4 v = load_words(a.data + 4 * (threadIdx.x ^ 37));
  store_shared(own(), v);
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      copy_bulk(a.data + 2 * kThreads * i, base() + 8 * kThreads * i, 8 * kThreads);
      copy_bulk_commit();
    }
    copy_bulk_wait_read<1>();
    store_shared(base() + offset, uint32_t{1});
    copy_bulk_wait_read();
  }
}
__global__ void first_bulk_copy_overwritten(Arguments a) { overwrite_behind_one_of_two(a, 0); }

// ---- wrong ----

__global__ void second_bulk_copy_overwritten(Arguments a) { overwrite_behind_one_of_two(a, 8 * kThreads); }

__global__ void shared_out_of_bounds(Arguments) { load_shared_1(base() + kBytes); }
__global__ void shared_misaligned(Arguments) { load_shared_4(base() + 4); }
__global__ void global_out_of_bounds(Arguments a) { a.data[4 * kThreads] = 1; }
__global__ void vector_out_of_bounds(Arguments a) { load_words(a.data + 4 * kThreads); }
__global__ void copy_out_of_bounds(Arguments a) { copy_async(base(), a.data + 4 * kThreads, true); }
__global__ void copy_partly_out_of_bounds(Arguments a) {
  wait_for_previous();
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, 4;" ::"r"(base()), "l"(a.few + 4) : "memory");
}
__global__ void copy_of_nothing_out_of_bounds(Arguments a) { copy_async(base(), a.data + 4 * kThreads, false); }
__global__ void read_without_barrier(Arguments) {
  store_shared(own(), uint32_t{1});
  load_shared_1(base() + 16 * (threadIdx.x ^ 1));
}
__global__ void write_behind_read(Arguments) {
  store_shared(own(), uint32_t{1});
  __syncthreads();
  load_shared_1(base() + 16 * (threadIdx.x ^ 1));
  store_shared(own(), uint32_t{2});
}
__global__ void pointer_without_barrier(Arguments) {
  memory[threadIdx.x] = 1;
  memory[threadIdx.x ^ 1] = 2;
}
__global__ void static_without_barrier(Arguments a) {
  wait_for_previous();
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1;
  a.data[threadIdx.x] = values[threadIdx.x ^ 1];
}
__global__ void shuffle_orders_nothing(Arguments) {
  store_shared(own(), uint32_t{1});
  __shfl_sync(0xffffffffu, 1, 0);
  load_shared_1(base() + 16 * (threadIdx.x ^ 1));
}
__global__ void copy_not_awaited(Arguments a) {
  wait_for_previous();
  copy_async(own(), a.data + 4 * threadIdx.x, true);
  copy_async_commit();
  load_shared_1(own());
}
__global__ void copy_of_others(Arguments a) {
  wait_for_previous();
  copy_async(own(), a.data + 4 * threadIdx.x, true);
  copy_async_commit();
  copy_async_wait_all_but<0>();
  load_shared_1(base() + 16 * (threadIdx.x ^ 1));
}
__global__ void fetch_not_awaited(Arguments a) {
  if (threadIdx.x == 0) {
    wait_for_previous();
    barrier_init(barrier(), 1);
    barrier_arrive_expect(barrier(), 16);
    fetch_bulk(base(), a.data, 16, barrier());
    load_shared_1(base());
  }
}
__global__ void bulk_copy_without_fence(Arguments a) {
  wait_for_previous();
  store_shared(own(), uint32_t{1});
  __syncthreads();
  if (threadIdx.x == 0) {
    copy_bulk(a.data, base(), 16 * kThreads);
    copy_bulk_commit();
    copy_bulk_wait_read();
  }
}
__global__ void bulk_copy_overwritten(Arguments a) {
  wait_for_previous();
  store_shared(own(), uint32_t{1});
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    copy_bulk(a.data, base(), 16 * kThreads);
    copy_bulk_commit();
    store_shared(base(), uint32_t{2});
    copy_bulk_wait_read();
  }
}
__global__ void bulk_copy_left_alone(Arguments a) {
  wait_for_previous();
  store_shared(own(), uint32_t{1});
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    copy_bulk(a.data, base(), 16 * kThreads);
  }
}
__global__ void product_without_fence(Arguments) {
  store_shared(own(), make_uint4(0, 0, 0, 0));
  __syncthreads();
  float sums[32];
  product_m64n64<float16, false>(sums, operand(operand_start(base(), 1024)), operand(operand_start(base(), 1024)));
  product_commit();
  product_wait<0>();
}
__global__ void product_overwritten(Arguments) {
  store_shared(own(), make_uint4(0, 0, 0, 0));
  fence_async();
  __syncthreads();
  float sums[32];
  product_m64n64<float16, false>(sums, operand(operand_start(base(), 1024)), operand(operand_start(base(), 1024)));
  product_commit();
  store_shared(own(), uint32_t{1});
  product_wait<0>();
}
__global__ void warp_at_two_places(Arguments) {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __shfl_sync(0xffffffffu, 1, 0);
  }
}
__global__ void barrier_not_initialised(Arguments) { barrier_wait(barrier(), 0); }
__global__ void barrier_seen_too_early(Arguments) {
  if (threadIdx.x == 0) {
    barrier_init(barrier(), kThreads);
  }
  barrier_arrive(barrier());
}
__global__ void too_many_arrivals(Arguments) {
  if (threadIdx.x == 0) {
    barrier_init(barrier(), 1);
    barrier_arrive_expect(barrier(), 16);
    barrier_arrive(barrier());
  }
}
__global__ void nobody_waits(Arguments) {
  if (threadIdx.x == 0) {
    barrier_init(barrier(), 1);
    barrier_arrive(barrier());
    barrier_arrive(barrier());
  }
}
__global__ void nobody_arrives(Arguments) {
  if (threadIdx.x == 0) {
    barrier_init(barrier(), 1);
  }
  __syncthreads();
  barrier_wait(barrier(), 0);
}
__global__ void barrier_without_some(Arguments) {
  if (threadIdx.x >= 32) {
    named_barrier_sync(1, kThreads);
  }
}

__global__ void previous_not_awaited(Arguments a) { load_words(a.data + 4 * threadIdx.x); }
__global__ void previous_awaited_by_another(Arguments a) {
  if (threadIdx.x == 0) {
    wait_for_previous();
  } else {
    load_words(a.data + 4 * threadIdx.x);
  }
}

struct Named {
  const char* name;
  Kernel kernel;
};
#define FCB_NAMED(kernel) {#kernel, kernel}
constexpr Named kKernels[] = {
    FCB_NAMED(through_shared_memory),
    FCB_NAMED(by_copies),
    FCB_NAMED(shared_out_of_bounds),
    FCB_NAMED(shared_misaligned),
    FCB_NAMED(global_out_of_bounds),
    FCB_NAMED(vector_out_of_bounds),
    FCB_NAMED(copy_out_of_bounds),
    FCB_NAMED(copy_partly_out_of_bounds),
    FCB_NAMED(copy_of_nothing_out_of_bounds),
    FCB_NAMED(read_without_barrier),
    FCB_NAMED(write_behind_read),
    FCB_NAMED(pointer_without_barrier),
    FCB_NAMED(static_without_barrier),
    FCB_NAMED(shuffle_orders_nothing),
    FCB_NAMED(copy_not_awaited),
    FCB_NAMED(copy_of_others),
    FCB_NAMED(fetch_not_awaited),
    FCB_NAMED(bulk_copy_without_fence),
    FCB_NAMED(bulk_copy_overwritten),
    FCB_NAMED(first_bulk_copy_overwritten),
    FCB_NAMED(second_bulk_copy_overwritten),
    FCB_NAMED(bulk_copy_left_alone),
    FCB_NAMED(product_without_fence),
    FCB_NAMED(product_overwritten),
    FCB_NAMED(warp_at_two_places),
    FCB_NAMED(barrier_not_initialised),
    FCB_NAMED(barrier_seen_too_early),
    FCB_NAMED(too_many_arrivals),
    FCB_NAMED(nobody_waits),
    FCB_NAMED(nobody_arrives),
    FCB_NAMED(barrier_without_some),
    FCB_NAMED(previous_not_awaited),
    FCB_NAMED(previous_awaited_by_another),
};

}  // namespace

// nullptr, or what is the matter. The right ones swap numbers, which are looked at as well.
extern "C" const char* emulated_broken_rule(const char* name, uint64_t seed) {
  std::vector<float> data(4 * kThreads);  // its address is a multiple of 16
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<float>(i);
  }
  alignas(16) float few[5] = {};
  const Arguments a{data.data(), few};
  emulated::begin(seed);
  emulated::allow(data.data(), data.size() * sizeof(float));
  emulated::allow(few, sizeof(few));
  for (const Named& named : kKernels) {
    if (std::strcmp(named.name, name) != 0) {
      continue;
    }
    if (!emulated::launch({1, 1, 1}, 1, kThreads, kBytes, true, [kernel = named.kernel, &a] { kernel(a); })) {
      return emulated::problem().c_str();
    }
    for (size_t i = 0; i < data.size(); ++i) {
      if (data[i] != static_cast<float>(i ^ 37 * 4)) {
        return "wrong numbers";
      }
    }
    return nullptr;
  }
  return "there is no such kernel";
}

}  // namespace fused_conv_bn
