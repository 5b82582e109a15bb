// What the parts of the emulated multiprocessor share. machine.h has what they do for others.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace emulated {

inline uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// ---- scheduler.cpp: threads ----

// For each thread how much of what it has done is known; one more is for bulk copies to shared memory.
using Clock = std::vector<uint32_t>;
void join(Clock& a, const Clock& b);

struct AsyncCopy {  // cp.async; without a size: an arrival behind those before it
  uint32_t to, size, bytes;
  const void* from;
  uint32_t barrier;
  bool moved = false;  // the data is there, which nobody can know yet
};
struct Piece {  // of a bulk copy
  uint32_t shared;
  unsigned char* global;
  uint32_t bytes;
};
struct BulkStore {
  uint32_t from, bytes;       // that are read
  std::vector<Piece> pieces;  // that are to be moved
};
struct IssuedProduct {
  uint64_t index;
  uint64_t a, b;  // descriptors
  unsigned n;
};

struct Thread {
  unsigned id;           // among those that run at the same time
  unsigned rank, index;  // of its block in the cluster; in the block
  void* stack_pointer = nullptr;
  bool done = false;
  std::string waits_for;
  Clock clock;
  bool knows_previous = false;  // that the kernel before has ended
  uint32_t fences = 0;
  uint64_t cluster_phase = 0;  // that it has arrived in
  bool in_cluster_barrier = false;
  std::deque<AsyncCopy> copies;
  std::deque<size_t> copy_groups;  // copies in each, the oldest first
  size_t open_copies = 0;
  std::deque<BulkStore> stores;
  std::deque<size_t> store_groups;  // stores in each, the oldest first
  size_t open_stores = 0;
  uint64_t products = 0;                // issued
  std::deque<uint64_t> product_groups;  // products up to the end of each that may be under way, the oldest first
  std::deque<IssuedProduct> operands;   // of products that may be under way; kept by a warp's first lane
};

constexpr size_t kStack = 256 << 10;  // a wgmma of 256 columns has 128 registers to name

extern std::vector<std::unique_ptr<Thread>> threads;  // of the cluster
extern unsigned blocks;                               // of the cluster
extern Thread* running;                               // nullptr: none
extern bool late;                                     // asynchronous operations happen as late as allowed
extern bool trusted;  // code of the emulator's own runs that compilers announce accesses of

inline unsigned warp_of(const Thread& t) { return t.rank * (kMostThreads / kWarp) + t.index / kWarp; }
inline unsigned warpgroup_of(const Thread& t) { return warp_of(t) / (kWarpgroup / kWarp); }
std::string name_of(unsigned thread);  // by its id
void set_seed(uint64_t seed);
unsigned draw(unsigned below);
// A thread has passed its clock on: what it does from now on is not covered by that.
void tick(Thread& t);
// Why something is not to be launched.
void refuse(const std::string& why);
// Until resume().
void wait(const std::string& what);
void resume(Thread* t);
uintptr_t stack_of(const Thread& t);

// ---- memory.cpp ----

enum class Writer { thread, copy, atomic };

// Shared memory's bytes, and those of __shared__ variables: who may know of what was done there.
void note_read(Thread& t, uintptr_t address, size_t bytes, bool by_proxy = false);
void note_write(Thread& t, uintptr_t address, size_t bytes, Writer writer = Writer::thread);
// Nobody knows of a bulk copy's writing but who has waited; `number`: of the copy.
void note_bulk_write(uintptr_t address, size_t bytes, uint32_t number);
// An asynchronous operation that reads them, or writes, begins (1) or ends (-1).
void note_reader(uintptr_t address, size_t bytes, int change);
void note_writer(uintptr_t address, size_t bytes, int change);
// Where an address of the shared memory of a block is.
unsigned char* shared_at(unsigned rank, uint32_t address);
// The same of the running thread's block; it is to exist.
unsigned char* at(uint32_t address, size_t bytes, const char* what, size_t alignment);
// Whether global memory belongs to an operand; and whether it may be accessed by now, too.
void check_exists(const void* pointer, size_t bytes, const char* what);
void check_global(const void* pointer, size_t bytes, const char* what, size_t alignment, bool write);
void begin_memory(uintptr_t arguments, size_t shared_bytes, bool early);  // of a launch
void end_memory();
void reset_memory();  // of a cluster
// At its end: whether blocks were there for as long as others read their shared memory.
void check_lifetimes();

// Where a byte of shared memory is of which rows of 128, 64 or 32 bytes are swizzled.
inline uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

// ---- tensor_map.cpp ----

struct Box {
  uint32_t bytes = 0;         // also what is outside of the tensor
  std::vector<Piece> pieces;  // inside
  bool to_tf32 = false;       // float32, which is rounded on the way
};
// As in shared memory from there on. Whether memory may be read or written is looked at.
Box find_box(const void* map, unsigned rank, const int* coordinates, const uint16_t* offsets, uint32_t shared,
             bool write);

// ---- asynchronous.cpp ----

// Ends one of the copies that others wait for; false if there is none.
bool complete_one();
void reset_asynchronous();

}  // namespace emulated
