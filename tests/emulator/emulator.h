// CUDA C++ on a CPU: what csrc/cuda/*.cu use of CUDA, so that g++ compiles them and every thread of every block runs.
//
// Blocks run one after another, in an order drawn from the seed. The threads of a block are fibers: one runs until it
// waits for others (a barrier, a shuffle, a vote) or returns; which one goes on then is drawn from the seed as well.
// README.md says what is checked and what is not.
#pragma once

#if !defined(__x86_64__)
#error "emulator.h switches between fibers with x86-64 instructions"
#endif

#include <link.h>
#include <math.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Two libraries made with this header must not share its variables.
#pragma GCC visibility push(hidden)

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // with red zones around each array
#else
#define __shared__ static thread_local  // so that all of them lie in one place, which can be poisoned
#endif
#define BDCORE_SHARED(Type, name) Type* name = reinterpret_cast<Type*>(::emulator::machine.dynamic_shared)

#define BDCORE_VECTORS(T, name, align2, align4)                                                     \
  struct alignas(align2) name##2 { T x, y; };                                                       \
  struct name##3 { T x, y, z; };                                                                    \
  struct alignas(align4) name##4 { T x, y, z, w; };                                                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                        \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
BDCORE_VECTORS(signed char, char, 2, 4)
BDCORE_VECTORS(unsigned char, uchar, 2, 4)
BDCORE_VECTORS(short, short, 4, 8)
BDCORE_VECTORS(unsigned short, ushort, 4, 8)
BDCORE_VECTORS(int, int, 8, 16)
BDCORE_VECTORS(unsigned int, uint, 8, 16)
BDCORE_VECTORS(long long, longlong, 16, 16)
BDCORE_VECTORS(unsigned long long, ulonglong, 16, 16)
BDCORE_VECTORS(float, float, 8, 16)
BDCORE_VECTORS(double, double, 16, 16)
#undef BDCORE_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

constexpr size_t kStack = 64 * 1024, kPage = 4096;
constexpr size_t kSharedLimit = 48 * 1024;  // what a launch gets without asking for more
constexpr unsigned char kPoison = 0xff;      // NaN in every floating-point format, -1 in every integer
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;  // the sanitizer has its own
#else
constexpr size_t kGuard = 256;
#endif

enum class State { ready, barrier, warp, returned };
enum class Operation { sync, shuffle, ballot, any, all };

// A place in the sources.
struct Place {
  const char* file;
  int line;
  const char* function;
};

struct Fiber {
  unsigned char* stack;  // its lowest address
  void* pointer;         // where it stopped
  void* fake_stack;      // the address sanitizer's
  uint3 index;
  State state;
  Place place;          // where it waits
  Operation operation;  // what it waits for in its warp, with which lanes, and what it gives
  unsigned int mask;
  int source;
  uint64_t value;
  int predicate;
};

struct Warp {
  unsigned int alive, waiting;  // lanes that have not returned; of these, those that wait for their warp
};

struct Machine {
  std::mutex busy;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::deque<int> runnable;
  bool depth_first = false;  // whether those released last go on first
  bool in_order = true;
  std::mt19937_64 random;
  const std::function<void()>* body = nullptr;
  unsigned char* dynamic_shared = nullptr;
  int threads = 0, current = -1, at_barrier = 0, returned = 0;
  bool in_kernel = false;
  std::string error;
  void* pointer = nullptr;  // where the scheduler stopped
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
};
inline Machine machine;
inline thread_local unsigned char marker;  // reading it makes this library's thread-local storage exist

// Stores the stack pointer to *from and goes on at `to`.
__attribute__((naked, noinline)) inline void switch_stack([[maybe_unused]] void** from, [[maybe_unused]] void* to) {
  asm("push %rbp\n\tpush %rbx\n\tpush %r12\n\tpush %r13\n\tpush %r14\n\tpush %r15\n\t"
      "mov %rsp, (%rdi)\n\tmov %rsi, %rsp\n\t"
      "pop %r15\n\tpop %r14\n\tpop %r13\n\tpop %r12\n\tpop %rbx\n\tpop %rbp\n\tret");
}

inline std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}
inline std::string text(const dim3& size) { return text(uint3{size.x, size.y, size.z}); }
inline std::string text(const Place& place) {
  return std::string(place.file) + ":" + std::to_string(place.line) + " (" + place.function + ")";
}

// Back to the scheduler, from a fiber.
inline void leave([[maybe_unused]] bool forever) {
  Fiber& fiber = machine.fibers[machine.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, machine.stack, machine.stack_size);
#endif
  switch_stack(&fiber.pointer, machine.pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.stack, &machine.stack_size);
#endif
}

// Ends the kernel; launch() throws the message. Threads are left where they are: kernels own nothing.
[[noreturn]] inline void fail(const std::string& message) {
  machine.error = message + " [block " + text(blockIdx) + ", thread " + text(threadIdx) + "]";
  leave(true);
  __builtin_unreachable();
}

inline void release(std::vector<int>& fibers) {
  if (!machine.in_order) std::shuffle(fibers.begin(), fibers.end(), machine.random);
  if (machine.depth_first) std::reverse(fibers.begin(), fibers.end());
  for (const int index : fibers) {
    machine.fibers[index].state = State::ready;
    if (machine.depth_first) {
      machine.runnable.push_front(index);
    } else {
      machine.runnable.push_back(index);
    }
  }
}

// All threads of the block meet; returns how many of them gave a true predicate.
inline int barrier(int predicate, const char* file, int line, const char* function) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = State::barrier;
  fiber.place = {file, line, function};
  fiber.predicate = predicate != 0;
  if (++machine.at_barrier == machine.threads) {
    machine.at_barrier = 0;
    uint64_t votes = 0;
    std::vector<int> all(machine.threads);
    std::iota(all.begin(), all.end(), 0);
    for (const int index : all) {
      const Fiber& other = machine.fibers[index];
      votes += other.predicate;
      if (other.place.line != line || std::strcmp(other.place.file, file) != 0) {
        fail("the threads of a block wait at different barriers: thread " + text(other.index) + " at " +
             text(other.place) + ", thread " + text(fiber.index) + " at " + text(fiber.place));
      }
    }
    for (const int index : all) machine.fibers[index].value = votes;
    release(all);
  }
  leave(false);
  return (int)machine.fibers[machine.current].value;
}

inline unsigned int bit(int lane) { return 1u << lane; }

// If all lanes of `mask` that have not returned wait, each gets its result and goes on.
inline void complete(int warp, unsigned int mask) {
  Warp& state = machine.warps[warp];
  const unsigned int lanes = mask & state.alive;
  if (lanes & ~state.waiting) return;
  Fiber* fibers = machine.fibers.data() + warp * warpSize;
  const int first = __builtin_ctz(lanes);
  unsigned int votes = 0;
  for (unsigned int rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const Fiber& fiber = fibers[lane];
    if (fiber.mask != mask || fiber.operation != fibers[first].operation) {
      fail("lanes of a warp wait for each other with different masks or at different operations: thread " +
           text(fibers[first].index) + " at " + text(fibers[first].place) + ", thread " + text(fiber.index) + " at " +
           text(fiber.place));
    }
    if (fiber.predicate) votes |= bit(lane);
  }
  uint64_t results[warpSize];
  std::vector<int> released;
  for (unsigned int rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    switch (fibers[lane].operation) {
      case Operation::sync: results[lane] = 0; break;
      // What a lane outside the mask, or one that has returned, would give is undefined.
      case Operation::shuffle:
        results[lane] = lanes & bit(fibers[lane].source) ? fibers[fibers[lane].source].value : ~uint64_t{0};
        break;
      case Operation::ballot: results[lane] = votes; break;
      case Operation::any: results[lane] = votes != 0; break;
      case Operation::all: results[lane] = votes == lanes; break;
    }
    released.push_back(warp * warpSize + lane);
  }
  for (unsigned int rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    fibers[lane].value = results[lane];
  }
  state.waiting &= ~lanes;
  release(released);
}

// The lanes of `mask` meet.
inline uint64_t meet(Operation operation, unsigned int mask, int source, uint64_t value, bool predicate, Place place) {
  Fiber& fiber = machine.fibers[machine.current];
  const int warp = machine.current / warpSize, lane = machine.current % warpSize;
  if (!(mask & bit(lane))) fail(text(place) + ": the mask does not name the lane that calls");
  fiber.state = State::warp;
  fiber.place = place;
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.source = source;
  fiber.value = value;
  fiber.predicate = predicate;
  machine.warps[warp].waiting |= bit(lane);
  complete(warp, mask);
  leave(false);
  return machine.fibers[machine.current].value;
}

template <class T>
T shuffle(unsigned int mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(Operation::shuffle, mask, source, bits, false, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int lane() { return machine.current % warpSize; }

// Where a fiber begins.
inline void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_size);
#endif
  (*machine.body)();
  const int warp = machine.current / warpSize;
  machine.fibers[machine.current].state = State::returned;
  ++machine.returned;
  Warp& state = machine.warps[warp];
  state.alive &= ~bit(lane());
  for (int other = 0; other < warpSize; ++other) {  // that waited for this one
    if (state.waiting & bit(other)) complete(warp, machine.fibers[warp * warpSize + other].mask);
  }
  leave(true);
}

inline void prepare(int index) {
  Fiber& fiber = machine.fibers[index];
  if (fiber.stack == nullptr) {
    void* place = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED || mprotect(place, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    fiber.stack = static_cast<unsigned char*>(place);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);  // of a kernel that failed
#endif
  const unsigned int x = blockDim.x, y = blockDim.y;
  fiber.index = {index % x, index / x % y, index / (x * y)};
  fiber.state = State::ready;
  fiber.fake_stack = nullptr;
  // Stacks that began at the same place of a page would fall into the same lines of the cache.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64 - size_t(index % 32) * 128);
  *--top = nullptr;  // nobody to return to
  *--top = reinterpret_cast<void*>(&thread_main);
  fiber.pointer = top - 6;
}

inline void resume(int index) {
  Fiber& fiber = machine.fibers[index];
  machine.current = index;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack, kStack);
#endif
  machine.in_kernel = true;
  switch_stack(&machine.pointer, fiber.pointer);
  machine.in_kernel = false;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

inline std::string situation(const Fiber& fiber) {
  const std::string thread = "thread " + text(fiber.index);
  if (fiber.state == State::returned) return thread + " has returned";
  return thread + " waits at " + text(fiber.place) + (fiber.state == State::warp ? " for lanes of its warp" : "");
}

// Nothing can go on, and not all have returned.
inline std::string deadlock() {
  const auto begin = machine.fibers.begin(), end = begin + machine.threads;
  const auto waiting = std::find_if(begin, end, [](const Fiber& fiber) { return fiber.state != State::returned; });
  const auto other = std::find_if(begin, end, [&](const Fiber& fiber) {
    return fiber.state != waiting->state || fiber.place.line != waiting->place.line;
  });
  std::string message = "not all threads reach a barrier: " + situation(*waiting);
  if (other != end) message += ", " + situation(*other);
  return message + " [block " + text(blockIdx) + " of " + std::to_string(machine.threads) + " threads]";
}

inline void run_block(uint3 block) {
  blockIdx = block;
  machine.at_barrier = machine.returned = 0;
  machine.depth_first = !machine.in_order && machine.random() % 2 == 0;
  machine.runnable.clear();
  std::vector<int> all(machine.threads);
  std::iota(all.begin(), all.end(), 0);
  machine.warps.assign((machine.threads + warpSize - 1) / warpSize, Warp{0, 0});
  for (const int index : all) {
    prepare(index);
    machine.warps[index / warpSize].alive |= bit(index % warpSize);
  }
  release(all);
  while (!machine.runnable.empty() && machine.error.empty()) {
    const int next = machine.runnable.front();
    machine.runnable.pop_front();
    resume(next);
  }
  if (machine.error.empty() && machine.returned < machine.threads) machine.error = deadlock();
}

// This library's thread-local storage: all __shared__ arrays of its kernels.
struct Region {
  void* begin;
  size_t size;
};
inline Region static_shared() {
  marker = 0;
  Region found{nullptr, 0};
#if !defined(__SANITIZE_ADDRESS__)
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        const auto own = reinterpret_cast<uintptr_t>(&machine);
        bool here = false;
        size_t size = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
          here |= segment.p_type == PT_LOAD && own >= begin && own < begin + segment.p_memsz;
          if (segment.p_type == PT_TLS) size = segment.p_memsz;
        }
        if (here) *static_cast<Region*>(result) = {info->dlpi_tls_data, size};
        return here ? 1 : 0;
      },
      &found);
#endif
  return found;
}

// While it lives, a kernel that touches memory which is not there fails like any other, and does not end the process.
class Faults {
 public:
  Faults() : memory_(64 * 1024) {
#if !defined(__SANITIZE_ADDRESS__)
    stack_t stack{};
    stack.ss_sp = memory_.data();
    stack.ss_size = memory_.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action {};
    action.sa_handler = [](int signal) {
      if (machine.in_kernel) fail("an address is used at which there is no memory");
      ::signal(signal, SIG_DFL);  // not ours: it comes again
    };
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_action_);
#endif
  }
  ~Faults() {
#if !defined(__SANITIZE_ADDRESS__)
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
#endif
  }
  Faults(const Faults&) = delete;

 private:
  std::vector<unsigned char> memory_;
  stack_t old_stack_{};
  struct sigaction old_action_ {};
};

// What a GPU would refuse.
inline void check(dim3 grid, dim3 block, size_t shared) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64) {
    throw std::runtime_error("a block of " + text(block) + " threads cannot be launched: at most 1024 of them");
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("a grid of " + text(grid) + " blocks cannot be launched: 1 to 2^31 - 1, 65535, 65535");
  }
  if (shared > kSharedLimit) {
    throw std::runtime_error(std::to_string(shared) + " bytes of shared memory cannot be launched with: 49152 at most");
  }
}

inline void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  check(grid, block, shared);
  const std::lock_guard<std::mutex> lock(machine.busy);
  const char* seed = std::getenv("BDCORE_EMULATOR_SEED");
  machine.in_order = seed == nullptr || std::strcmp(seed, "0") == 0;
  machine.random.seed(machine.in_order ? 0 : std::strtoull(seed, nullptr, 10));
  machine.body = &body;
  machine.threads = int(block.x * block.y * block.z);
  if (machine.fibers.size() < size_t(machine.threads)) machine.fibers.resize(machine.threads, Fiber{});
  machine.error.clear();
  gridDim = grid;
  blockDim = block;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(1, shared + kGuard)) != 0) throw std::bad_alloc();
  machine.dynamic_shared = static_cast<unsigned char*>(memory);
  const Region region = static_shared();
  const Faults faults;

  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (!machine.in_order) std::shuffle(order.begin(), order.end(), machine.random);
  for (const uint64_t index : order) {
    std::memset(memory, kPoison, shared + kGuard);
    if (region.begin != nullptr) std::memset(region.begin, kPoison, region.size);
    const uint64_t row = index / grid.x;
    run_block({unsigned(index % grid.x), unsigned(row % grid.y), unsigned(row / grid.y)});
    const auto* guard = machine.dynamic_shared + shared;
    if (machine.error.empty() && std::any_of(guard, guard + kGuard, [](unsigned char x) { return x != kPoison; })) {
      machine.error =
          "written beyond " + std::to_string(shared) + " bytes of shared memory [block " + text(blockIdx) + "]";
    }
    if (!machine.error.empty()) break;
  }
  std::free(memory);
  machine.dynamic_shared = nullptr;
  if (!machine.error.empty()) throw std::runtime_error("emulated kernel: " + machine.error);
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace emulator

#define BDCORE_HERE \
  const char *file = __builtin_FILE(), int line = __builtin_LINE(), const char *name = __builtin_FUNCTION()

inline void __syncthreads(BDCORE_HERE) { emulator::barrier(0, file, line, name); }
inline int __syncthreads_count(int predicate, BDCORE_HERE) { return emulator::barrier(predicate, file, line, name); }
inline int __syncthreads_or(int predicate, BDCORE_HERE) { return emulator::barrier(predicate, file, line, name) != 0; }
inline int __syncthreads_and(int predicate, BDCORE_HERE) {
  return emulator::barrier(predicate, file, line, name) == emulator::machine.threads;
}
inline void __syncwarp(unsigned int mask = 0xffffffffu, BDCORE_HERE) {
  emulator::meet(emulator::Operation::sync, mask, 0, 0, false, {file, line, name});
}
inline unsigned int __ballot_sync(unsigned int mask, int predicate, BDCORE_HERE) {
  return (unsigned int)emulator::meet(emulator::Operation::ballot, mask, 0, 0, predicate != 0, {file, line, name});
}
inline int __any_sync(unsigned int mask, int predicate, BDCORE_HERE) {
  return (int)emulator::meet(emulator::Operation::any, mask, 0, 0, predicate != 0, {file, line, name});
}
inline int __all_sync(unsigned int mask, int predicate, BDCORE_HERE) {
  return (int)emulator::meet(emulator::Operation::all, mask, 0, 0, predicate != 0, {file, line, name});
}
template <class T>
T __shfl_sync(unsigned int mask, T value, int source, int width = 32, BDCORE_HERE) {
  const int first = emulator::lane() & ~(width - 1);
  return emulator::shuffle(mask, value, first + (source & (width - 1)), {file, line, name});
}
template <class T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32, BDCORE_HERE) {
  const int own = emulator::lane(), source = own - (int)delta;
  return emulator::shuffle(mask, value, source < (own & ~(width - 1)) ? own : source, {file, line, name});
}
template <class T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32, BDCORE_HERE) {
  const int own = emulator::lane(), source = own + (int)delta;
  return emulator::shuffle(mask, value, source >= (own & ~(width - 1)) + width ? own : source, {file, line, name});
}
template <class T>
T __shfl_xor_sync(unsigned int mask, T value, int lanes, int width = 32, BDCORE_HERE) {
  const int own = emulator::lane(), source = own ^ lanes;
  return emulator::shuffle(mask, value, source >= (own & ~(width - 1)) + width ? own : source, {file, line, name});
}
#undef BDCORE_HERE

namespace emulator {
// Ends the kernel, or on the host, the process.
[[noreturn]] inline void wrong(const std::string& message) {
  if (machine.in_kernel) fail(message);
  std::fprintf(stderr, "%s\n", message.c_str());
  std::abort();
}

// The beginning of what the compiler's checks (-fsanitize=alignment,null,bounds-strict) hand over.
struct Checked {
  const char* file;
  uint32_t line, column;
};
}  // namespace emulator

// What assert(), and the compiler's checks, call when they fail.
extern "C" {
inline void __assert_fail(const char* condition, const char* file, unsigned int line, const char* function) noexcept {
  emulator::wrong(emulator::text({file, (int)line, function}) + ": assertion `" + condition + "` failed");
}
__attribute__((used)) inline void __ubsan_handle_type_mismatch_v1_abort(emulator::Checked* check, void* pointer) {
  emulator::wrong(std::string(check->file) + ":" + std::to_string(check->line) + ": " +
                  (pointer == nullptr ? "a null pointer is used" : "an address is not aligned as its type asks"));
}
__attribute__((used)) inline void __ubsan_handle_out_of_bounds_abort(emulator::Checked* check, void* index) {
  emulator::wrong(std::string(check->file) + ":" + std::to_string(check->line) + ": index " +
                  std::to_string(reinterpret_cast<intptr_t>(index)) + " is outside an array");
}
}
[[noreturn]] inline void __trap() { emulator::fail("__trap() was called"); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Integers alone: the order of additions of floating-point numbers would not repeat on a GPU.
template <class T, class Update>
T emulated_atomic(T* place, Update update) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomic functions take integers alone");
  const T old = *place;
  *place = update(old);
  return old;
}
template <class T>
T atomicAdd(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [&](T old) { return T(old + value); });
}
template <class T>
T atomicSub(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [&](T old) { return T(old - value); });
}
template <class T>
T atomicMax(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicOr(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [&](T old) { return T(old | value); });
}
template <class T>
T atomicAnd(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [&](T old) { return T(old & value); });
}
template <class T>
T atomicExch(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* place, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emulated_atomic(place, [&](T old) { return old == expected ? value : old; });
}
inline unsigned int atomicInc(unsigned int* place, unsigned int limit) {
  return emulated_atomic(place, [&](unsigned int old) { return old >= limit ? 0u : old + 1; });
}

template <class T> T __ldg(const T* place) { return *place; }
template <class T> T __ldcs(const T* place) { return *place; }
template <class T> T __ldcg(const T* place) { return *place; }
template <class T> void __stcs(T* place, std::common_type_t<T> value) { *place = value; }
template <class T> void __stcg(T* place, std::common_type_t<T> value) { *place = value; }

inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned int)x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline unsigned int __brev(unsigned int x) {
  unsigned int result = 0;
  for (int i = 0; i < 32; ++i) result |= ((x >> i) & 1u) << (31 - i);
  return result;
}
inline unsigned int __umulhi(unsigned int a, unsigned int b) { return (unsigned int)(((uint64_t)a * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline unsigned int __float_as_uint(float x) { return emulator::bits_as<unsigned int>(x); }
inline float __uint_as_float(unsigned int x) { return emulator::bits_as<float>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits_as<double>(x); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline unsigned int __float2uint_rn(float x) { return (unsigned int)rintf(x); }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned int x) { return (float)x; }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return a != a ? T(b) : b != b ? T(a) : T(a) < T(b) ? T(a) : T(b);
  return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return a != a ? T(b) : b != b ? T(a) : T(a) > T(b) ? T(a) : T(b);
  return T(a) > T(b) ? T(a) : T(b);
}

#pragma GCC visibility pop
