// Every access to memory: whether it may be, and what orders it.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>

#include "multiprocessor.h"

namespace emulated {

unsigned char* dynamic_shared = nullptr;

namespace {

alignas(1024) unsigned char shared_memory[kMostBlocks][kSharedBytes];

constexpr uint16_t kNobody = 0xffff;

struct Range {
  uintptr_t first, last;

  bool has(uintptr_t address, size_t bytes) const { return address >= first && address + bytes <= last; }
};
struct Memory {  // global
  Range range;
  bool read = false, written = false;        // by this kernel
  bool was_read = true, was_written = true;  // by kernels before, which may still run
};
std::vector<Memory> allowed;
bool begins_early = false;        // before the kernel before has ended
bool next_sees_previous = false;  // the next kernel may begin before that
Range arguments;                  // of the launch: on the stack that called it
Range statics;                    // this library's variables, the array of shared memory among them
size_t launched_shared_bytes = 0;

struct Access {
  uint32_t clock;
  uint16_t thread;
};
struct Cell {  // of a byte
  Access write{0, kNobody};
  uint32_t fences = 0;   // of the writer, when it wrote
  bool by_copy = false;  // cannot be fenced
  bool atomic = false;   // written by an atomic operation
  uint8_t reads = 0;
  // Asynchronous operations under way that read it, or write to it.
  uint16_t read_by = 0, written_by = 0;
  std::array<Access, 4> read;
};
constexpr size_t kPage = 4096;
Cell* cells = nullptr;  // there are some of used pages
std::vector<bool> page_used;

// Of the bytes from here on.
Cell* cells_of(uintptr_t address, size_t bytes) {
  const size_t offset = address - statics.first;
  for (size_t page = offset / kPage; page <= (offset + bytes - 1) / kPage; ++page) {
    if (!page_used[page]) {
      page_used[page] = true;
      std::uninitialized_fill_n(cells + page * kPage, kPage, Cell{});
    }
  }
  return cells + offset;
}

bool is_shared(uintptr_t address) {
  return Range{number(shared_memory), number(shared_memory + kMostBlocks)}.has(address, 1);
}

std::string place_of(uintptr_t address) {
  if (!is_shared(address)) {
    return "a __shared__ variable";
  }
  const size_t offset = address - number(shared_memory);
  return "byte " + std::to_string(offset % kSharedBytes) + " of shared memory" +
         (blocks > 1 ? " of rank " + std::to_string(offset / kSharedBytes) : "");
}

bool is_before(const Access& access, const Thread& t) {
  return access.thread == kNobody || access.thread == t.id || t.clock[access.thread] >= access.clock;
}

// Of each thread the last read of another block's shared memory, by the rank of that.
std::map<std::pair<unsigned, uint16_t>, uint32_t> reads_of_others;

// Of threads that have waited for the kernel before.
std::vector<Access> waits;

// Whether a thread has, or another one whose wait is ordered before.
bool knows_previous(Thread& t) {
  t.knows_previous = t.knows_previous || !begins_early ||
                     std::any_of(waits.begin(), waits.end(), [&](const Access& wait) { return is_before(wait, t); });
  return t.knows_previous;
}

uintptr_t address_of(const Cell& c) { return statics.first + static_cast<size_t>(&c - cells); }

[[noreturn]] void race(const char* now, const char* before, const Cell& c, unsigned other) {
  const std::string by = other < threads.size() ? name_of(other) : "a bulk copy";
  fail("%s of %s, and nothing orders it behind the %s by %s", now, place_of(address_of(c)).c_str(), before, by.c_str());
}

Memory& find_operand(uintptr_t address, size_t bytes, const char* what) {
  const auto found = std::find_if(allowed.begin(), allowed.end(),
                                  [&](const Memory& m) { return m.range.has(address, bytes); });
  if (found == allowed.end()) {
    fail("%s of %zu bytes of global memory that belong to no operand, or not all of them", what, bytes);
  }
  return *found;
}

// The segment that can be written to of the library that this is in.
void find_statics() {
  if (statics.first != 0) {
    return;
  }
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const uintptr_t first = info->dlpi_addr + segment.p_vaddr, last = first + segment.p_memsz;
          const uintptr_t inside = number(shared_memory);
          if (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) != 0 && inside >= first && inside < last) {
            statics = {first, last};
          }
        }
        return 0;
      },
      nullptr);
  page_used.resize((statics.last - statics.first) / kPage + 1);
  // Addresses alone, until pages are used.
  cells = static_cast<Cell*>(mmap(nullptr, page_used.size() * kPage * sizeof(Cell), PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

}  // namespace

void note_read(Thread& t, uintptr_t address, size_t bytes, bool by_proxy) {
  const Access own{t.clock[t.id], static_cast<uint16_t>(t.id)};
  Cell* const first = cells_of(address, bytes);
  for (Cell* c = first; c < first + bytes; ++c) {
    if (c->written_by > 0) {
      fail("read of %s, which a copy under way is to write", place_of(address_of(*c)).c_str());
    }
    if (!is_before(c->write, t)) {
      race("read", "write", *c, c->write.thread);
    }
    if (by_proxy && c->write.thread != kNobody && !c->by_copy && threads[c->write.thread]->fences == c->fences) {
      fail("asynchronous read of %s, which %s has written without a fence.proxy.async behind it",
           place_of(address_of(*c)).c_str(), name_of(c->write.thread).c_str());
    }
    uint8_t kept = 0;  // reads that this one does not cover
    for (uint8_t i = 0; i < c->reads; ++i) {
      if (!is_before(c->read[i], t)) {
        c->read[kept++] = c->read[i];
      }
    }
    if (kept == c->read.size()) {
      kept = static_cast<uint8_t>(draw(kept));  // one is forgotten
      c->read[kept] = own;
    } else {
      c->read[kept] = own;
      c->reads = static_cast<uint8_t>(kept + 1);
    }
  }
}

void note_write(Thread& t, uintptr_t address, size_t bytes, Writer writer) {
  Cell* const first = cells_of(address, bytes);
  for (Cell* c = first; c < first + bytes; ++c) {
    if (c->read_by > 0 || c->written_by > 0) {
      fail("write of %s, which a copy or product under way is to %s", place_of(address_of(*c)).c_str(),
           c->read_by > 0 ? "read" : "write");
    }
    if (!is_before(c->write, t) && !(c->atomic && writer == Writer::atomic)) {
      race("write", "write", *c, c->write.thread);
    }
    for (uint8_t i = 0; i < c->reads; ++i) {
      if (!is_before(c->read[i], t)) {
        race("write", "read", *c, c->read[i].thread);
      }
    }
    c->write = {t.clock[t.id], static_cast<uint16_t>(t.id)};
    c->fences = t.fences;
    c->by_copy = writer == Writer::copy;
    c->atomic = writer == Writer::atomic;
    c->reads = 0;
  }
}

void note_reader(uintptr_t address, size_t bytes, int change) {
  Cell* const first = cells_of(address, bytes);
  for (Cell* c = first; c < first + bytes; ++c) {
    c->read_by = static_cast<uint16_t>(c->read_by + change);
  }
}
void note_writer(uintptr_t address, size_t bytes, int change) {
  Cell* const first = cells_of(address, bytes);
  for (Cell* c = first; c < first + bytes; ++c) {
    c->written_by = static_cast<uint16_t>(c->written_by + change);
  }
}

void note_bulk_write(uintptr_t address, size_t bytes, uint32_t number) {
  Cell* const first = cells_of(address, bytes);
  for (Cell* c = first; c < first + bytes; ++c) {
    c->write = {number, static_cast<uint16_t>(threads.size())};
  }
}

unsigned char* at(uint32_t address, size_t bytes, const char* what, size_t alignment) {
  if (address < kSharedBase || address + bytes > kSharedBase + launched_shared_bytes) {
    fail("%s of %zu bytes at %lld of shared memory, of which there are %zu bytes", what, bytes,
         static_cast<long long>(address) - kSharedBase, launched_shared_bytes);
  }
  if (address % alignment != 0) {
    fail("%s at %u of shared memory, which is no multiple of %zu", what, address - kSharedBase, alignment);
  }
  return shared_at(running->rank, address);
}
unsigned char* shared_at(unsigned rank, uint32_t address) { return shared_memory[rank] + (address - kSharedBase); }

void check_exists(const void* pointer, size_t bytes, const char* what) { find_operand(number(pointer), bytes, what); }

void check_global(const void* pointer, size_t bytes, const char* what, size_t alignment, bool write) {
  const uintptr_t address = number(pointer);
  Memory& operand = find_operand(address, bytes, what);
  if (address % alignment != 0) {
    fail("%s of global memory at an address that is no multiple of %zu", what, alignment);
  }
  if ((operand.was_written || (write && operand.was_read)) && !knows_previous(*running)) {
    fail("%s of global memory that a kernel before may still %s: nothing orders it behind a griddepcontrol.wait", what,
         operand.was_written ? "write to" : "read");
  }
  (write ? operand.written : operand.read) = true;
}

void begin_memory(uintptr_t frame, size_t shared_bytes, bool early) {
  find_statics();
  begins_early = early;
  next_sees_previous = false;
  arguments = {frame, frame + (16 << 10)};
  launched_shared_bytes = shared_bytes;
}

void end_memory() {
  for (Memory& m : allowed) {
    m.was_read = m.read || (next_sees_previous && m.was_read);
    m.was_written = m.written || (next_sees_previous && m.was_written);
    m.read = m.written = false;
  }
}

void reset_memory() {
  waits.clear();
  reads_of_others.clear();
  // What is left of another block is not to be relied on. Halves and floats among these are NaN now and then.
  for (size_t i = 0; i < blocks * kSharedBytes; i += 8) {
    const uint64_t bits = uint64_t{draw(1u << 31)} << 33 | uint64_t{draw(1u << 31)} << 2 |
                          (draw(4) == 0 ? 0x7fffffff7fff7fffull : 0);
    std::memcpy(shared_memory[0] + i, &bits, 8);
  }
  std::fill(page_used.begin(), page_used.end(), false);
}

void check_lifetimes() {
  for (const auto& [read, clock] : reads_of_others) {
    const auto& [rank, thread] = read;
    const Access access{clock, thread};
    if (std::none_of(threads.begin(), threads.end(),
                     [&](const auto& t) { return t->rank == rank && is_before(access, *t); })) {
      fail("%s reads shared memory of rank %u, and nothing keeps that block from ending before",
           name_of(thread).c_str(), rank);
    }
  }
}

void begin(uint64_t seed) {
  allowed.clear();
  set_seed(seed);
}
void allow(const void* start, size_t bytes) {
  if (start != nullptr) {
    allowed.push_back({{number(start), number(start) + bytes}});
  }
}

void wait_for_previous() {
  waits.push_back({running->clock[running->id], static_cast<uint16_t>(running->id)});
  tick(*running);
}
void let_next_begin() { next_sees_previous = next_sees_previous || !knows_previous(*running); }

void load_shared(uint32_t address, void* to, unsigned bytes) {
  const unsigned char* const from = at(address, bytes, "load", bytes);
  note_read(*running, number(from), bytes);
  std::memcpy(to, from, bytes);
}
void store_shared(uint32_t address, const void* from, unsigned bytes) {
  unsigned char* const to = at(address, bytes, "store", bytes);
  note_write(*running, number(to), bytes);
  std::memcpy(to, from, bytes);
}
uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(number(pointer) - number(dynamic_shared)) + kSharedBase;
}
uint32_t map_to_rank(uint32_t address, int rank) {
  at(address, 1, "mapa", 1);
  if (rank < 0 || static_cast<unsigned>(rank) >= blocks) {
    fail("mapa to rank %d of a cluster of %u", rank, blocks);
  }
  return (static_cast<uint32_t>(rank) + 1) << 24 | address;
}
void load_cluster(uint32_t address, void* to, unsigned bytes) {
  const unsigned rank = address >> 24 == 0 ? running->rank : (address >> 24) - 1;
  const uint32_t own = address & 0xffffff;
  at(own, bytes, "load", bytes);
  const unsigned char* const from = shared_at(rank, own);
  note_read(*running, number(from), bytes);
  if (rank != running->rank) {
    reads_of_others[{rank, static_cast<uint16_t>(running->id)}] = running->clock[running->id];
  }
  std::memcpy(to, from, bytes);
}
void touch_atomically(const void* pointer) { note_write(*running, number(pointer), 4, Writer::atomic); }
void load_global(const void* from, void* to, unsigned bytes) {
  check_global(from, bytes, "load", bytes, false);
  std::memcpy(to, from, bytes);
}
void store_global(void* to, const void* from, unsigned bytes) {
  check_global(to, bytes, "store", bytes, true);
  std::memcpy(to, from, bytes);
}

// ---- accesses through pointers: compilers call these (-fsanitize=thread) ----

namespace {

void look_at(const void* pointer, size_t bytes, bool write) {
  if (running == nullptr || trusted) {
    return;
  }
  const uintptr_t address = number(pointer);
  const uintptr_t stack = stack_of(*running);
  if (Range{stack, stack + kStack}.has(address, bytes)) {
    return;
  }
  if (pointer == &dynamic_shared) {
    return;
  }
  if (statics.has(address, bytes)) {
    if (is_shared(address)) {
      at(shared_address(pointer), bytes, write ? "store" : "load", 1);
    } else if (blocks > 1) {
      fail("access to a __shared__ variable in a cluster: of these each block has its own, which is not emulated");
    }
    if (write) {
      note_write(*running, address, bytes);
    } else {
      note_read(*running, address, bytes);
    }
    return;
  }
  if (!write && arguments.has(address, bytes)) {
    return;
  }
  check_global(pointer, bytes, write ? "store" : "load", 1, write);
}

}  // namespace
}  // namespace emulated

#define FCB_HOOKS(bytes)                                                                        \
  extern "C" void __tsan_read##bytes(void* p) { emulated::look_at(p, bytes, false); }           \
  extern "C" void __tsan_write##bytes(void* p) { emulated::look_at(p, bytes, true); }           \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { emulated::look_at(p, bytes, false); } \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { emulated::look_at(p, bytes, true); }
FCB_HOOKS(1)
FCB_HOOKS(2)
FCB_HOOKS(4)
FCB_HOOKS(8)
FCB_HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { emulated::look_at(p, bytes, false); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { emulated::look_at(p, bytes, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
// Of Clang alone.
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  emulated::look_at(from, bytes, false);
  emulated::look_at(to, bytes, true);
  return std::memcpy(to, from, bytes);
}
extern "C" void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  emulated::look_at(from, bytes, false);
  emulated::look_at(to, bytes, true);
  return std::memmove(to, from, bytes);
}
extern "C" void* __tsan_memset(void* to, int value, size_t bytes) {
  emulated::look_at(to, bytes, true);
  return std::memset(to, value, bytes);
}
