// The threads of a block: fibers that run by turns, and meet.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>

#include "multiprocessor.h"

// Saves the registers that a call keeps, and goes on with another stack.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulated {

std::vector<std::unique_ptr<Thread>> threads;
unsigned blocks = 1;
Thread* running = nullptr;
bool late = false;
bool trusted = false;

namespace {

std::vector<unsigned char*> stacks;
std::vector<Thread*> runnable;
void* scheduler_stack = nullptr;
Index block, grid_of_launch;  // block: the cluster's first one
unsigned threads_of_block = 0;
const std::function<void()>* kernel_of_launch = nullptr;
std::mt19937_64 random_numbers;
uint64_t first_seed = 0;      // since begin()
uint64_t seed_of_launch = 0;  // of the next one
bool favourites = false;      // some warps run whenever they can
std::array<unsigned, kMostBlocks * kMostThreads / kWarp> priorities;
std::string broken_rule;

struct RuleBroken {};  // outside of a thread

void pause() { emulated_switch(&running->stack_pointer, scheduler_stack); }

// In its block, by its id.
std::string number_of(unsigned thread) {
  return std::to_string(thread % threads_of_block) +
         (blocks > 1 ? " of rank " + std::to_string(thread / threads_of_block) : "");
}

// ---- meetings ----

struct Meeting {
  const char* name = nullptr;
  unsigned expected = 0;
  std::vector<Thread*> waiting;
  Clock clock;
  unsigned arrived = 0;
  void* arguments[kWarp];
};
std::map<std::pair<unsigned, uint32_t>, Meeting> warp_meetings;  // by warp and mask
struct BlockMeetings {
  std::array<Meeting, 16> barriers;
  Meeting votes;
  bool vote = false, outcome = false;
};
std::array<BlockMeetings, kMostBlocks> meetings;
Meeting of_cluster;
uint64_t cluster_phase = 0;
Clock cluster_clock;  // of the phase before
size_t ended = 0;     // threads

void release(Meeting& m, bool ordered) {
  for (Thread* t : m.waiting) {
    if (ordered) {
      join(t->clock, m.clock);
    }
    if (t != running) {
      resume(t);
    }
  }
  if (ordered) {
    std::fill(m.clock.begin(), m.clock.end(), 0);
  }
  m.waiting.clear();
  m.arrived = 0;
  m.name = nullptr;
}

void arrive(Meeting& m, bool ordered, bool waits) {
  if (ordered) {
    m.clock.resize(running->clock.size());
    join(m.clock, running->clock);
    tick(*running);
  }
  ++m.arrived;
  if (waits) {
    m.waiting.push_back(running);
  }
}

// Threads that have ended need not arrive.
void end_cluster_phase_if_due() {
  if (of_cluster.arrived > 0 && of_cluster.arrived + ended == threads.size()) {
    ++cluster_phase;
    cluster_clock = of_cluster.clock;
    release(of_cluster, true);
  }
}

// ---- the scheduler ----

void enter() {
  (*kernel_of_launch)();
  if (running->in_cluster_barrier) {
    fail("%s has ended without a barrier.cluster.wait behind its arrive", name_of(running->id).c_str());
  }
  running->done = true;
  ++ended;
  end_cluster_phase_if_due();
  pause();
}

void prepare(Thread& t, unsigned char* stack) {
  auto* top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // where a caller's address would be
  *--top = reinterpret_cast<void*>(&enter);
  top -= 6;  // registers
  t.stack_pointer = top;
}

// Takes it from those that can run.
Thread* choose() {
  if (runnable.empty()) {
    return nullptr;
  }
  const auto size = static_cast<unsigned>(runnable.size());
  unsigned chosen = draw(size);
  for (int i = 0; favourites && i < 8; ++i) {
    const unsigned other = draw(size);
    if (priorities[warp_of(*runnable[other])] > priorities[warp_of(*runnable[chosen])]) {
      chosen = other;
    }
  }
  Thread* const t = runnable[chosen];
  runnable[chosen] = runnable.back();
  runnable.pop_back();
  return t;
}

void reset_cluster() {
  warp_meetings.clear();
  meetings.fill({});
  of_cluster = {};
  cluster_phase = ended = 0;
  reset_memory();
  reset_asynchronous();
  threads.clear();
  runnable.clear();
  const unsigned count = blocks * threads_of_block;
  for (unsigned i = 0; i < count; ++i) {
    threads.push_back(std::make_unique<Thread>());
    Thread& t = *threads.back();
    t.id = i;
    t.rank = i / threads_of_block;
    t.index = i % threads_of_block;
    t.clock.assign(count + 1, 0);
    t.clock[i] = 1;
    if (stacks.size() <= i) {
      stacks.push_back(static_cast<unsigned char*>(
          mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
      mprotect(stacks.back(), 4096, PROT_NONE);  // an overflow ends here, not in another thread's stack
    }
    prepare(t, stacks[i]);
    runnable.push_back(&t);
  }
  for (unsigned& priority : priorities) {
    priority = draw(3);
  }
  late = draw(2) != 0;
  favourites = draw(2) != 0;
}

void run_cluster() {
  for (;;) {
    if (!late && draw(4) == 0) {
      complete_one();
    }
    Thread* const next = choose();
    if (next != nullptr) {
      running = next;
      dynamic_shared = shared_at(next->rank, kSharedBase);
      emulated_switch(&scheduler_stack, next->stack_pointer);
      running = nullptr;
      if (!broken_rule.empty()) {
        return;
      }
    } else if (!complete_one()) {
      break;
    }
  }
  std::map<std::string, std::vector<unsigned>> stuck;
  for (const auto& t : threads) {
    if (!t->done) {
      stuck[t->waits_for].push_back(t->id);
    } else if (!t->stores.empty()) {
      fail("%s has ended while its bulk copies may still read shared memory", name_of(t->id).c_str());
    }
  }
  if (!stuck.empty()) {
    std::string text;
    for (const auto& [what, ids] : stuck) {
      text += (text.empty() ? "" : ", ") + std::to_string(ids.size()) + " threads from " + number_of(ids.front()) +
              " on at " + what;
    }
    fail("deadlock: %s", text.c_str());
  }
  check_lifetimes();
}

}  // namespace

void join(Clock& a, const Clock& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = std::max(a[i], b[i]);
  }
}
unsigned draw(unsigned below) { return static_cast<unsigned>(random_numbers() % below); }
void refuse(const std::string& why) { broken_rule = why; }
void tick(Thread& t) { ++t.clock[t.id]; }
void wait(const std::string& what) {
  running->waits_for = what;
  pause();
}
void resume(Thread* t) { runnable.push_back(t); }
std::string name_of(unsigned thread) { return "thread " + number_of(thread); }
uintptr_t stack_of(const Thread& t) { return number(stacks[t.id]); }

Index thread_index() { return {running->index, 0, 0}; }
Index block_index() { return {block.x + running->rank, block.y, block.z}; }
Index grid_size() { return grid_of_launch; }
Index block_size() { return {threads_of_block, 1, 1}; }

const std::string& problem() { return broken_rule; }

uint64_t launches() { return seed_of_launch - first_seed; }

bool launch(Index grid, unsigned cluster, unsigned count, size_t shared_bytes, bool early,
            const std::function<void()>& kernel) {
  broken_rule.clear();
  if (count == 0 || count > kMostThreads || shared_bytes > kSharedBytes) {
    broken_rule = "a launch of " + std::to_string(count) + " threads with " + std::to_string(shared_bytes) +
                  " bytes of shared memory";
    return false;
  }
  if (cluster == 0 || cluster > kMostBlocks || grid.x % cluster != 0) {
    broken_rule = "a launch of " + std::to_string(grid.x) + " blocks in clusters of " + std::to_string(cluster);
    return false;
  }
  random_numbers.seed(seed_of_launch++);
  grid_of_launch = grid;
  blocks = cluster;
  threads_of_block = count;
  kernel_of_launch = &kernel;
  begin_memory(number(__builtin_frame_address(0)), shared_bytes, early);
  for (block.z = 0; block.z < grid.z; ++block.z) {
    for (block.y = 0; block.y < grid.y; ++block.y) {
      for (block.x = 0; block.x < grid.x; block.x += cluster) {
        reset_cluster();
        try {
          run_cluster();
        } catch (const RuleBroken&) {
        }
        running = nullptr;
        if (!broken_rule.empty()) {
          broken_rule += " (block " + std::to_string(block.x) + ", " + std::to_string(block.y) + ")";
          return false;
        }
      }
    }
  }
  end_memory();
  return true;
}

void fail(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  broken_rule = text;
  // The way here, for translate.py to put lines to.
  void* frame = __builtin_frame_address(0);
  if (running != nullptr) {
    broken_rule += "; " + name_of(running->id) + ", at";
    const auto bottom = number(stacks[running->id]);
    for (int depth = 0; depth < 12 && number(frame) >= bottom && number(frame) < bottom + kStack - 32; ++depth) {
      auto** const words = static_cast<void**>(frame);
      Dl_info info;
      if (words[1] == nullptr || dladdr(words[1], &info) == 0) {
        break;
      }
      std::snprintf(text, sizeof text, " +%#zx", static_cast<size_t>(number(words[1]) - number(info.dli_fbase) - 1));
      broken_rule += text;
      frame = words[0];
    }
    pause();  // for good
  }
  throw RuleBroken{};
}

void meet_in_warp(const char* name, uint32_t mask, void* argument, bool ordered,
                  const std::function<void(void* const (&)[kWarp])>& f) {
  const unsigned lane = running->index % kWarp, warp = warp_of(*running);
  if ((mask >> lane & 1) == 0) {
    fail("%s without its own lane in the mask", name);
  }
  Meeting& m = warp_meetings[{warp, mask}];
  if (m.name != nullptr && std::strcmp(m.name, name) != 0) {
    fail("%s, while other lanes of the warp are at %s", name, m.name);
  }
  m.name = name;
  m.arguments[lane] = argument;
  arrive(m, ordered, true);
  if (m.arrived == static_cast<unsigned>(__builtin_popcount(mask))) {
    trusted = true;
    f(m.arguments);
    trusted = false;
    release(m, ordered);
    return;
  }
  wait(name);
}

void meet_at_barrier(unsigned barrier, unsigned count, bool waits) {
  Meeting& m = meetings[running->rank].barriers.at(barrier);
  const unsigned expected = count == 0 ? threads_of_block : count;
  if (m.arrived > 0 && m.expected != expected) {
    fail("bar %u for %u threads, where others are for %u", barrier, expected, m.expected);
  }
  m.expected = expected;
  arrive(m, true, waits);
  if (m.arrived == expected) {
    release(m, true);
  } else if (waits) {
    wait("bar.sync");
  }
}

bool any_in_block(bool condition) {
  auto& [barriers, votes, vote, outcome] = meetings[running->rank];
  vote = (votes.arrived > 0 && vote) || condition;
  arrive(votes, true, true);
  if (votes.arrived == threads_of_block) {
    outcome = vote;
    release(votes, true);
  } else {
    wait("__syncthreads_or");
  }
  return outcome;
}

unsigned cluster_rank() { return running->rank; }

void cluster_arrive() {
  const unsigned lanes = std::min(kWarp, threads_of_block - running->index / kWarp * kWarp);
  meet_in_warp("barrier.cluster.arrive", 0xffffffffu >> (kWarp - lanes), nullptr, false, [](auto&) {});
  if (running->in_cluster_barrier) {
    fail("barrier.cluster.arrive behind another one that was not waited for");
  }
  running->in_cluster_barrier = true;
  running->cluster_phase = cluster_phase;
  arrive(of_cluster, true, false);
  end_cluster_phase_if_due();
}

void cluster_wait() {
  if (!running->in_cluster_barrier) {
    fail("barrier.cluster.wait without an arrive before");
  }
  running->in_cluster_barrier = false;
  if (running->cluster_phase == cluster_phase) {
    of_cluster.waiting.push_back(running);
    wait("barrier.cluster.wait");
  } else {
    join(running->clock, cluster_clock);
  }
}

void set_seed(uint64_t seed) {
  broken_rule.clear();
  first_seed = seed_of_launch = seed;
}

}  // namespace emulated
