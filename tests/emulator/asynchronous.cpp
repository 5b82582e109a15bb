// What happens beside the threads: copies, matrix products, and the barriers in shared memory that tell of them.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>

#include "multiprocessor.h"

namespace emulated {
namespace {

// ---- mbarriers ----

struct Barrier {
  uint32_t arrivals = 0, pending = 0;
  int64_t bytes = 0;  // expected, less those that came
  uint64_t phase = 0;
  bool waited = true;  // somebody has waited for the phase before
  Clock gathered, completed;
  std::vector<std::pair<Thread*, uint32_t>> waiting;  // with the parity
};
std::map<std::pair<unsigned, uint32_t>, Barrier> mbarriers;  // by block and address

Barrier& find_barrier(unsigned rank, uint32_t address) {
  const auto found = mbarriers.find({rank, address});
  if (found == mbarriers.end()) {
    fail("an mbarrier at %u of shared memory that was not initialised", address - kSharedBase);
  }
  return found->second;
}

void complete_if_due(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) {
    return;
  }
  if (!b.waited) {
    fail("an mbarrier's phase %llu has ended, and nobody has waited for the one before",
         static_cast<unsigned long long>(b.phase));
  }
  ++b.phase;
  b.waited = !b.waiting.empty();
  b.pending = b.arrivals;
  b.completed = b.gathered;
  std::fill(b.gathered.begin(), b.gathered.end(), 0);
  for (const auto& [t, parity] : b.waiting) {
    join(t->clock, b.completed);
    resume(t);
  }
  b.waiting.clear();
}

void arrive_at(uint32_t address, Thread& t) {
  Barrier& b = find_barrier(t.rank, address);
  if (b.pending == 0) {
    fail("more arrivals at the mbarrier at %u of shared memory than the phase has", address - kSharedBase);
  }
  join(b.gathered, t.clock);
  tick(t);
  --b.pending;
  complete_if_due(b);
}

// ---- asynchronous copies ----

struct Fetch {
  unsigned rank;  // of the block
  uint32_t to, barrier;
  Box box;
  Clock clock;
};
std::vector<Fetch> fetches;
size_t copies_under_way = 0;  // of all threads
uint32_t bulk_copies = 0;     // that were started

void start_copy(const AsyncCopy& copy) {
  running->copies.push_back(copy);
  ++running->open_copies;
  ++copies_under_way;
}

void move(const Thread& t, const AsyncCopy& copy) {
  if (!copy.moved) {
    unsigned char* const to = shared_at(t.rank, copy.to);
    std::memcpy(to, copy.from, copy.bytes);
    std::memset(to + copy.bytes, 0, copy.size - copy.bytes);
  }
}

void complete_copy(Thread& t) {  // the oldest
  const AsyncCopy copy = t.copies.front();
  t.copies.pop_front();
  --copies_under_way;
  if (copy.size == 0) {
    arrive_at(copy.barrier, t);
    return;
  }
  unsigned char* const to = shared_at(t.rank, copy.to);
  note_writer(number(to), copy.size, -1);
  note_write(t, number(to), copy.size);
  move(t, copy);
}

// To nearest, halves away from zero.
void round_to_tf32(unsigned char* at, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 4) {
    uint32_t bits;
    std::memcpy(&bits, at + i, 4);
    const bool finite = (bits & 0x7f800000) != 0x7f800000;
    bits = (bits + (finite ? ~kTf32 / 2 + 1 : 0)) & kTf32;
    std::memcpy(at + i, &bits, 4);
  }
}

void complete_fetch(size_t index) {
  const Fetch fetch = std::move(fetches[index]);
  if (index + 1 < fetches.size()) {
    fetches[index] = std::move(fetches.back());
  }
  fetches.pop_back();
  unsigned char* const to = shared_at(fetch.rank, fetch.to);
  note_writer(number(to), fetch.box.bytes, -1);
  std::memset(to, 0, fetch.box.bytes);
  for (const Piece& piece : fetch.box.pieces) {
    std::memcpy(shared_at(fetch.rank, piece.shared), piece.global, piece.bytes);
    if (fetch.box.to_tf32) {
      round_to_tf32(shared_at(fetch.rank, piece.shared), piece.bytes);
    }
  }
  Barrier& b = find_barrier(fetch.rank, fetch.barrier);
  join(b.gathered, fetch.clock);
  b.bytes -= fetch.box.bytes;
  complete_if_due(b);
}

void check_bulk(uint32_t bytes) {
  if (bytes % 16 != 0 || bytes == 0) {
    fail("cp.async.bulk of %u bytes", bytes);
  }
}

void start_fetch(uint32_t to, Box&& box, uint32_t barrier) {
  unsigned char* const target = at(to, box.bytes, "cp.async.bulk", 16);
  note_read(*running, number(at(barrier, 8, "cp.async.bulk's mbarrier", 8)), 8);
  find_barrier(running->rank, barrier);
  note_write(*running, number(target), box.bytes, Writer::copy);
  note_writer(number(target), box.bytes, 1);
  note_bulk_write(number(target), box.bytes, ++bulk_copies);
  fetches.push_back({running->rank, to, barrier, std::move(box), running->clock});
  fetches.back().clock.back() = bulk_copies;
  tick(*running);
}

void start_store(uint32_t from, Box&& box) {
  const unsigned char* const source = at(from, box.bytes, "cp.async.bulk", 16);
  note_read(*running, number(source), box.bytes, true);
  note_reader(number(source), box.bytes, 1);
  running->stores.push_back({from, box.bytes, std::move(box.pieces)});
  ++running->open_stores;
}

void move_store(BulkStore& store) {  // of the running thread
  for (const Piece& piece : store.pieces) {
    std::memcpy(piece.global, shared_at(running->rank, piece.shared), piece.bytes);
  }
  store.pieces.clear();
}

// ---- products ----

struct Product {
  unsigned rank;  // of the block
  Factor type;
  unsigned n;
  uint64_t a, b;
  bool add;
  unsigned there = 0;
  std::array<std::array<float*, 128>, kWarpgroup> sums;
};
struct Warpgroup {
  std::deque<Product> products;
  uint64_t done = 0;                                  // those before the first in the queue
  std::vector<std::pair<Thread*, uint64_t>> waiting;  // until so many are done
};
std::array<Warpgroup, kMostBlocks * kMostThreads / kWarpgroup> warpgroups;

struct Operand {
  uint32_t start, other_half, step;
  uint32_t span;  // of a swizzled row; 0 without swizzling
  explicit Operand(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        other_half(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        step(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        span(bits >> 62 == 0 ? 0 : 256u >> (bits >> 62)) {
    const auto whole = static_cast<unsigned long long>(bits);
    if ((bits >> 49 & 7) != 0) {
      fail("a wgmma descriptor with a base offset: %#llx", whole);
    }
    // It may start at any row of a pattern, as an H200 was seen to do with rows of 128 bytes: swizzling goes by addresses.
    const uint32_t pattern = std::max(1u, 8 * span);
    if (start % std::max(1u, span) % 32 != 0 || step % pattern != 0) {
      fail("a wgmma descriptor of a swizzled operand that starts within 32 bytes, or has no whole patterns: %#llx",
           whole);
    }
  }
  // 16 bytes of k of a row.
  uint32_t chunk(unsigned row, unsigned half) const {
    return span == 0 ? start + half * other_half + row / 8 * step + row % 8 * 16
                     : swizzled(start + row / 8 * step + row % 8 * span + half * 16, span);
  }
  // f(address, bytes) of what lies together.
  template <typename F>
  void for_each_part(unsigned rows, F&& f) const {
    for (unsigned row = 0; row < rows; row += span == 0 ? 8 : 1) {
      if (span == 0) {
        f(chunk(row, 0), 128);
        f(chunk(row, 1), 128);
      } else {
        f(std::min(chunk(row, 0), chunk(row, 1)), 32);
      }
    }
  }
};

// A product begins to read it.
void note_begin(Thread& t, const Operand& operand, unsigned rows) {
  operand.for_each_part(rows, [&](uint32_t address, unsigned bytes) {
    const uintptr_t part = number(at(address, bytes, "wgmma's read", 16));
    note_read(t, part, bytes, true);
    note_reader(part, bytes, 1);
  });
}
// It is known to be over: what others know of the thread from before does not tell them.
void note_end(Thread& t, const Operand& operand, unsigned rows) {
  operand.for_each_part(rows, [&](uint32_t address, unsigned bytes) {
    const uintptr_t part = number(shared_at(t.rank, address));
    note_reader(part, bytes, -1);
    note_read(t, part, bytes);
  });
}

void multiply(const Product& p) {
  const unsigned bytes = p.type == Factor::tf32 ? 4 : 2, depth = 32 / bytes, chunk = 16 / bytes;
  const auto value = [&](const unsigned char* from) {
    uint32_t bits = 0;
    std::memcpy(&bits, from, bytes);
    if (p.type != Factor::tf32) {
      return from_half(p.type == Factor::float16 ? Half::float16 : Half::bfloat16, static_cast<uint16_t>(bits));
    }
    return std::bit_cast<float>(bits & kTf32);
  };
  const auto values = [&](const Operand& operand, unsigned rows) {
    std::vector<float> all(rows * depth);
    for (unsigned row = 0; row < rows; ++row) {
      for (unsigned k = 0; k < depth; ++k) {
        all[row * depth + k] = value(shared_at(p.rank, operand.chunk(row, k / chunk)) + k % chunk * bytes);
      }
    }
    return all;
  };
  const std::vector<float> a = values(Operand(p.a), 64), b = values(Operand(p.b), p.n);
  for (unsigned thread = 0; thread < kWarpgroup; ++thread) {
    for (unsigned i = 0; i < p.n / 2; ++i) {
      const unsigned row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const unsigned col = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float& sum = *p.sums[thread][i];
      double total = p.add ? sum : 0.0;
      for (unsigned k = 0; k < depth; ++k) {
        total += double{a[row * depth + k]} * b[col * depth + k];
      }
      sum = static_cast<float>(total);
    }
  }
}

void do_products(Warpgroup& g, uint64_t until) {
  while (g.done < until && !g.products.empty() && g.products.front().there == kWarpgroup) {
    multiply(g.products.front());
    g.products.pop_front();
    ++g.done;
  }
  std::erase_if(g.waiting, [&](const auto& waiting) {
    if (waiting.second > g.done) {
      return false;
    }
    if (waiting.first != running) {
      resume(waiting.first);
    }
    return true;
  });
}

}  // namespace

bool complete_one() {
  if (copies_under_way + fetches.size() == 0) {
    return false;
  }
  std::vector<Thread*> candidates;
  for (const auto& t : threads) {
    if (!t->copies.empty()) {
      candidates.push_back(t.get());
    }
  }
  const size_t i = draw(static_cast<unsigned>(candidates.size() + fetches.size()));
  if (i < fetches.size()) {
    complete_fetch(i);
  } else {
    complete_copy(*candidates[i - fetches.size()]);
  }
  return true;
}

void reset_asynchronous() {
  mbarriers.clear();
  fetches.clear();
  copies_under_way = bulk_copies = 0;
  for (Warpgroup& g : warpgroups) {
    g = {};
  }
}

void barrier_init(uint32_t barrier, uint32_t arrivals) {
  note_write(*running, number(at(barrier, 8, "mbarrier.init", 8)), 8);
  Barrier b;
  b.arrivals = b.pending = arrivals;
  b.gathered.assign(running->clock.size(), 0);
  b.completed = b.gathered;
  mbarriers[{running->rank, barrier}] = b;
}
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes) {
  note_read(*running, number(at(barrier, 8, "mbarrier.arrive", 8)), 8);
  find_barrier(running->rank, barrier).bytes += expected_bytes;
  arrive_at(barrier, *running);
}
void barrier_arrive_behind_copies(uint32_t barrier) {
  note_read(*running, number(at(barrier, 8, "cp.async.mbarrier.arrive", 8)), 8);
  find_barrier(running->rank, barrier);
  if (running->copies.empty()) {
    arrive_at(barrier, *running);
  } else {
    start_copy({0, 0, 0, nullptr, barrier});
  }
}
void barrier_wait(uint32_t barrier, uint32_t parity) {
  note_read(*running, number(at(barrier, 8, "mbarrier.try_wait", 8)), 8);
  Barrier& b = find_barrier(running->rank, barrier);
  if ((b.phase & 1) != parity) {
    b.waited = true;
    join(running->clock, b.completed);
    return;
  }
  b.waiting.emplace_back(running, parity);
  wait("the mbarrier at " + std::to_string(barrier - kSharedBase) + ", parity " + std::to_string(parity));
}

void copy_async(uint32_t to, const void* from, unsigned size, unsigned bytes) {
  unsigned char* const target = at(to, size, "cp.async", size);
  if (bytes > size) {
    fail("cp.async of %u bytes into %u", bytes, size);
  }
  check_exists(from, size, "cp.async");
  if (bytes > 0) {
    check_global(from, bytes, "cp.async", 1, false);
  }
  if (number(from) % size != 0) {
    fail("cp.async from an address that is no multiple of %u", size);
  }
  note_write(*running, number(target), size);
  note_writer(number(target), size, 1);
  start_copy({to, size, bytes, from, 0});
  if (!late && draw(2) != 0) {
    move(*running, running->copies.back());
    running->copies.back().moved = true;
  }
}
void copy_async_commit() {
  running->copy_groups.push_back(running->open_copies);
  running->open_copies = 0;
}
void copy_async_wait(unsigned groups_left) {
  // Completion is in order, so that what may still be under way are the youngest.
  size_t may_stay = running->open_copies;
  for (size_t i = 0; i < std::min<size_t>(groups_left, running->copy_groups.size()); ++i) {
    may_stay += running->copy_groups[running->copy_groups.size() - 1 - i];
  }
  while (running->copies.size() > may_stay) {
    complete_copy(*running);
  }
  while (running->copy_groups.size() > groups_left) {
    running->copy_groups.pop_front();
  }
}

void fetch_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  check_bulk(bytes);
  check_global(from, bytes, "cp.async.bulk", 16, false);
  start_fetch(to, {bytes, {{to, static_cast<unsigned char*>(const_cast<void*>(from)), bytes}}}, barrier);
}
void copy_bulk(void* to, uint32_t from, uint32_t bytes) {
  check_bulk(bytes);
  check_global(to, bytes, "cp.async.bulk", 16, true);
  start_store(from, {bytes, {{from, static_cast<unsigned char*>(to), bytes}}});
}
void fetch_box(uint32_t to, const void* map, unsigned rank, const int* coordinates, const uint16_t* offsets,
               uint32_t barrier) {
  start_fetch(to, find_box(map, rank, coordinates, offsets, to, false), barrier);
}
void store_box(const void* map, unsigned rank, const int* coordinates, uint32_t from) {
  start_store(from, find_box(map, rank, coordinates, nullptr, from, true));
}
void copy_bulk_commit() {
  std::deque<BulkStore>& stores = running->stores;
  if (!late) {
    std::for_each(stores.end() - static_cast<ptrdiff_t>(running->open_stores), stores.end(), move_store);
  }
  running->store_groups.push_back(running->open_stores);
  running->open_stores = 0;
}
void copy_bulk_wait(unsigned groups_left) {
  while (running->store_groups.size() > groups_left) {
    for (size_t i = 0; i < running->store_groups.front(); ++i) {
      BulkStore& store = running->stores.front();
      const uintptr_t source = number(shared_at(running->rank, store.from));
      note_reader(source, store.bytes, -1);
      note_read(*running, source, store.bytes);
      move_store(store);
      running->stores.pop_front();
    }
    running->store_groups.pop_front();
  }
}
void fence_async() { ++running->fences; }

void product(Factor type, unsigned n, float* const* sums, uint64_t a, uint64_t b, bool add) {
  Warpgroup& g = warpgroups[warpgroup_of(*running)];
  const size_t index = running->products++ - g.done;
  if (index == g.products.size()) {
    g.products.push_back({running->rank, type, n, a, b, add, 0, {}});
  }
  Product& p = g.products[index];
  if (p.type != type || p.n != n || p.a != a || p.b != b || p.add != add) {
    fail("wgmma with other operands than the other threads of its warpgroup");
  }
  std::copy(sums, sums + n / 2, p.sums[running->index % kWarpgroup].begin());
  if (running->index % kWarp == 0) {
    note_begin(*running, Operand(a), 64);
    note_begin(*running, Operand(b), n);
    running->operands.push_back({running->products - 1, a, b, n});
  }
  if (++p.there == kWarpgroup && !late) {
    do_products(g, g.done + index + 1);
  }
}
void product_commit() { running->product_groups.push_back(running->products); }
void product_wait(unsigned groups_left) {
  Warpgroup& g = warpgroups[warpgroup_of(*running)];
  std::deque<uint64_t>& groups = running->product_groups;
  if (groups.size() <= groups_left) {
    return;
  }
  const uint64_t until = groups[groups.size() - groups_left - 1];
  groups.erase(groups.begin(), groups.end() - groups_left);
  g.waiting.emplace_back(running, until);
  do_products(g, until);
  if (g.done < until) {
    wait("wgmma.wait_group");
  }
  std::deque<IssuedProduct>& operands = running->operands;
  while (!operands.empty() && operands.front().index < until) {
    note_end(*running, Operand(operands.front().a), 64);
    note_end(*running, Operand(operands.front().b), operands.front().n);
    operands.pop_front();
  }
}

}  // namespace emulated
