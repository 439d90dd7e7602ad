// The scheduler of cuda_emulation.h: blocks in sequence, the threads of a block as fibers.
#include "cuda_emulation.h"

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace petal_emulation {

ThreadIndex thread_index{0};
dim3 block_index, block_size, grid_size;
const char* reported_error = nullptr;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarp = 32;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  int group;
};

#if defined(__x86_64__)
// Callee-saved registers live on the stack of the side that waits; a context is its stack pointer.
extern "C" void petal_switch_stack(void** save, void* load);
asm(R"(
.text
.type petal_switch_stack, @function
petal_switch_stack:
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
.size petal_switch_stack, .-petal_switch_stack
)");
using Context = void*;
#else
using Context = ucontext_t;
#endif

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  State state = State::kDone;
  unsigned thread = 0;
  int group = 0;  // number of committed cp.async groups
  uint64_t collectives = 0;
  std::vector<Copy> copies;
  void* fake_stack = nullptr;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<std::vector<unsigned>> order;  // the threads of each warp, warps and lanes permuted
  std::vector<unsigned> at_warp, warp_size;
  std::vector<unsigned char> scratch;
  unsigned char* shared = nullptr;
  unsigned at_block = 0, threads = 0;
  Fiber* current = nullptr;
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
  const char* error = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake = nullptr;
};

Machine machine;
Settings the_settings;

void to_scheduler(bool finished) {
  Fiber& fiber = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#else
  static_cast<void>(finished);
#endif
#if defined(__x86_64__)
  petal_switch_stack(&fiber.context, machine.scheduler);
#else
  swapcontext(&fiber.context, &machine.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.current->fake_stack, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
  (*machine.kernel)();
  machine.current->state = State::kDone;
  to_scheduler(true);
  std::abort();
}

void prepare(Fiber& fiber, unsigned thread) {
  if (fiber.stack == nullptr) {
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    fiber.stack = static_cast<unsigned char*>(memory);
  }
  fiber.thread = thread;
  fiber.state = State::kReady;
  fiber.group = 0;
  fiber.collectives = 0;
  fiber.copies.clear();
#if defined(__x86_64__)
  // Six registers, then the entry; the call convention wants rsp = 8 mod 16 there, as after a call.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  top -= 6;
  std::fill(top, top + 6, nullptr);
  fiber.context = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  thread_index.x = fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake, fiber.stack, kStackBytes);
#endif
#if defined(__x86_64__)
  petal_switch_stack(&machine.scheduler, fiber.context);
#else
  swapcontext(&machine.scheduler, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake, nullptr, nullptr);
#endif
}

// A permutation of 0 .. n-1: the identity for seed 0. (A Fisher-Yates shuffle on a linear
// congruential sequence: reproducible everywhere.)
std::vector<unsigned> permutation(unsigned n, uint64_t seed) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (seed == 0) return order;
  for (unsigned i = n; i > 1; --i) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[i - 1], order[(seed >> 33) % i]);
  }
  return order;
}

// Runs all threads of the current block to their end. False: some wait at a barrier that the others
// have left behind.
bool run_block() {
  for (;;) {
    bool ran = false, waiting = false;
    for (const std::vector<unsigned>& warp : machine.order) {
      for (bool again = true; again;) {  // a warp at a time, so that its lanes meet again soon
        again = false;
        for (unsigned thread : warp) {
          if (machine.fibers[thread].state != State::kReady) continue;
          resume(machine.fibers[thread]);
          ran = again = true;
        }
      }
    }
    for (const Fiber& fiber : machine.fibers) waiting = waiting || fiber.state != State::kDone;
    if (!waiting) return true;
    if (!ran) return false;
  }
}

}  // namespace

Settings& settings() { return the_settings; }

unsigned char* dynamic_shared() { return machine.shared; }

void block_barrier() {
  machine.current->state = State::kAtBlockBarrier;
  if (++machine.at_block == machine.threads) {
    machine.at_block = 0;
    for (Fiber& fiber : machine.fibers) fiber.state = State::kReady;
  }
  to_scheduler(false);
}

void warp_barrier() {
  Fiber& self = *machine.current;
  const unsigned warp = self.thread / kWarp;
  ++self.collectives;
  self.state = State::kAtWarpBarrier;
  if (++machine.at_warp[warp] == machine.warp_size[warp]) {
    machine.at_warp[warp] = 0;
    for (unsigned lane = 0; lane < machine.warp_size[warp]; ++lane)
      machine.fibers[warp * kWarp + lane].state = State::kReady;
  }
  to_scheduler(false);
}

void* warp_scratch() {
  const Fiber& self = *machine.current;
  return machine.scratch.data() + (self.thread / kWarp * 2 + self.collectives % 2) * kScratchBytes;
}

void async_copy(void* shared, const void* global, int bytes) {
  Fiber& self = *machine.current;
  self.copies.push_back({shared, global, bytes, self.group});
}

void async_commit() { ++machine.current->group; }

void async_wait(int pending) {
  Fiber& self = *machine.current;
  size_t kept = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group >= self.group - pending) {
      self.copies[kept++] = copy;
      continue;
    }
    if (copy.bytes > 0) std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    std::memset(static_cast<unsigned char*>(copy.shared) + copy.bytes, 0,
                static_cast<size_t>(16 - copy.bytes));
  }
  self.copies.resize(kept);
}

const char* last_error() {
  const char* const error = machine.error;
  machine.error = nullptr;
  return error;
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  machine.threads = block.x;
  machine.kernel = &kernel;
  machine.fibers.resize(block.x);
  const unsigned warps = (block.x + kWarp - 1) / kWarp;
  machine.scratch.assign(static_cast<size_t>(warps) * 2 * kScratchBytes, 0);
  machine.warp_size.assign(warps, 0);
  for (unsigned warp = 0; warp < warps; ++warp)
    machine.warp_size[warp] = std::min(kWarp, block.x - warp * kWarp);
  machine.order.assign(warps, {});
  const std::vector<unsigned> warp_order = permutation(warps, the_settings.thread_seed);
  for (unsigned thread : permutation(block.x, the_settings.thread_seed))
    machine.order[warp_order[thread / kWarp]].push_back(thread);
  grid_size = grid;
  block_size = block;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned block_id : permutation(blocks, the_settings.block_seed)) {
    block_index = dim3(block_id % grid.x, block_id / grid.x % grid.y, block_id / grid.x / grid.y);
    // Allocated anew per block and no byte larger than asked for, so that the address sanitizer
    // sees an overrun.
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, std::max<size_t>(shared_bytes, 1)) != 0) std::abort();
    std::memset(shared, 0xFF, shared_bytes);
    machine.shared = static_cast<unsigned char*>(shared);
    machine.at_block = 0;
    machine.at_warp.assign(warps, 0);
    for (unsigned thread = 0; thread < block.x; ++thread) prepare(machine.fibers[thread], thread);
    const bool finished = run_block();
    std::free(shared);
    if (!finished) {
      machine.error = "emulation: threads of a block wait at a barrier that others never reach";
      return;
    }
  }
}

}  // namespace petal_emulation

// For the tests, through ctypes.
extern "C" __attribute__((visibility("default"))) void petal_emulation_configure(
    uint64_t block_seed, uint64_t thread_seed, int multiprocessors) {
  petal_emulation::settings() = {block_seed, thread_seed, multiprocessors};
}
