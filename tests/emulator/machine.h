// A GPU's multiprocessors in software, for tests: runs the threads of a block, or of a cluster of blocks, by turns, in an
// order that a seed decides, and holds them to the rules of CUDA's memory model.
//
// A thread is a fiber that runs until it has to wait for others. Copies and matrix products that are asynchronous happen
// at once or as late as allowed, by the seed. Every access to shared memory is looked up: was the last write, and for a
// write every read, before it by what barriers guarantee (vector clocks, as in FastTrack, Flanagan and Freund, 2009)? And
// every access to global memory: does it belong to an operand, and may kernels before still be at it? What breaks a rule ends the
// launch with a message.
//
// Instructions (ptx.h) and CUDA's intrinsics (cuda_runtime.h) are written in these terms. translate.py makes C++ of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulated {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned kWarp = 32;
constexpr unsigned kWarpgroup = 128;
constexpr unsigned kMostThreads = 1024;
constexpr uint32_t kSharedBase = 1024;  // the 32-bit address of shared memory's first byte
constexpr size_t kSharedBytes = 227 * 1024;

constexpr unsigned kMostBlocks = 8;  // of a cluster, which run at the same time; of others one after another

// Of the running thread's block.
extern unsigned char* dynamic_shared;

// ---- of the running thread ----

Index thread_index();
Index block_index();
Index grid_size();
Index block_size();

// ---- launches ----

// Before an op's launches: nothing is allowed, and the order of events is that of a seed.
void begin(uint64_t seed);
// What kernels may touch besides shared memory and their own variables.
void allow(const void* start, size_t bytes);
// Runs kernel() in each thread of each block; so many blocks next to each other are a cluster. early: it may begin
// before the kernel before has ended; the one before the first may have made anything. False if a rule was broken: then
// problem() says which.
bool launch(Index grid, unsigned cluster, unsigned threads, size_t shared_bytes, bool early,
            const std::function<void()>& kernel);
const std::string& problem();
// Since begin().
uint64_t launches();

// ---- what threads do ----

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The lanes of a mask meet; the last one to come calls f with each lane's argument. `name` says what they meet for. With
// `ordered`, what was done before is visible behind it.
void meet_in_warp(const char* name, uint32_t mask, void* argument, bool ordered,
                  const std::function<void(void* const (&arguments)[kWarp])>& f);
// A named barrier (bar.sync, and bar.arrive, which does not wait). threads: 0 for all of the block.
void meet_at_barrier(unsigned barrier, unsigned threads, bool waits);
// All threads of a block meet, and learn whether the condition holds for any.
bool any_in_block(bool condition);

// Shared memory by its 32-bit addresses, in naturally aligned accesses.
void load_shared(uint32_t address, void* to, unsigned bytes);
void store_shared(uint32_t address, const void* from, unsigned bytes);
uint32_t shared_address(const void* pointer);
// What an atomic operation on 4 bytes of shared memory touches: others of these need not be ordered.
void touch_atomically(const void* pointer);
void load_global(const void* from, void* to, unsigned bytes);
void store_global(void* to, const void* from, unsigned bytes);

// barrier.cluster, mapa, and a load from the shared memory of any block of the cluster.
unsigned cluster_rank();
void cluster_arrive();
void cluster_wait();
uint32_t map_to_rank(uint32_t address, int rank);
void load_cluster(uint32_t address, void* to, unsigned bytes);

// griddepcontrol
void wait_for_previous();
void let_next_begin();

void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes);
void barrier_arrive_behind_copies(uint32_t barrier);
void barrier_wait(uint32_t barrier, uint32_t parity);

// cp.async: `bytes` are read, and zeros fill what is left of `size`. All of `size` are to belong to an operand, even where
// none are read: compute-sanitizer takes it for an access to so many.
void copy_async(uint32_t to, const void* from, unsigned size, unsigned bytes);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);
// cp.async.bulk
void fetch_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void copy_bulk(void* to, uint32_t from, uint32_t bytes);
void copy_bulk_commit();
void copy_bulk_wait(unsigned groups_left);
void fence_async();
// cp.async.bulk.tensor: a box by its map and coordinates, the fastest first. offsets: of an im2col map's pixels, else
// nullptr.
void check_map(const void* map);
void fetch_box(uint32_t to, const void* map, unsigned rank, const int* coordinates, const uint16_t* offsets,
               uint32_t barrier);
void store_box(const void* map, unsigned rank, const int* coordinates, uint32_t from);
// The driver's function of this name, or nullptr.
void* driver_function(const char* name);

// wgmma: sums (64 x n) = a * b (+ sums), 32 bytes of k; a and b by their descriptors. Sums are rounded to nearest, where tensor
// cores cut off: errors on a GPU are larger. Of tf32, bits of float32 are cut off, as there.
enum class Half { float16, bfloat16 };
enum class Factor { float16, bfloat16, tf32 };
constexpr uint32_t kTf32 = 0xffffe000;  // the bits of float32 that count
void product(Factor type, unsigned n, float* const* sums, uint64_t a, uint64_t b, bool add);
void product_commit();
void product_wait(unsigned groups_left);

// ---- numbers ----

float from_half(Half type, uint16_t bits);
uint16_t to_half(Half type, float value);

}  // namespace emulated
