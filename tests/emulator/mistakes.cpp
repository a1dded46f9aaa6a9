// Small kernels, right ones and ones with a mistake, by which tests/test_emulator.py judges the emulator.
// Called with a kernel's name; prints the numbers that it wrote.
#include "emulator.h"

#include <cassert>
#include <iostream>
#include <map>

namespace {

using Numbers = std::vector<float>;
constexpr unsigned int kAll = 0xffffffffu;

enum Mistake { none, no_barrier, half_a_block, some_return, two_places };

// The sum of n numbers, by one block.
template <int mistake>
__global__ void block_sum(const float* x, float* out, int n) {
  __shared__ float partial[32];
  float sum = 0;
  for (unsigned int i = threadIdx.x; i < (unsigned int)n; i += blockDim.x) sum += x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (mistake == some_return && threadIdx.x == 40) return;
  if (mistake == two_places && threadIdx.x < 64) {
    __syncthreads();
  } else if (mistake != no_barrier && !(mistake == half_a_block && threadIdx.x >= 64)) {
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  float total = 0;
  for (unsigned int warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
  out[0] = total;
}

// Each step reads what the other threads wrote in the one before: needs a barrier after reading and after writing.
template <bool barrier_after_reading>
__global__ void rotate(float* out, int steps) {
  __shared__ float ring[64];
  ring[threadIdx.x] = (float)threadIdx.x;
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const float next = ring[(threadIdx.x + 1) % 64];
    if (barrier_after_reading) __syncthreads();
    ring[threadIdx.x] = next;
    __syncthreads();
  }
  out[threadIdx.x] = ring[threadIdx.x];
}

// Inclusive sums within a warp, in segments of `width` lanes.
__global__ void scan(float* out, int width) {
  int sum = (int)threadIdx.x;
  for (int step = 1; step < width; step *= 2) {
    const int other = __shfl_up_sync(kAll, sum, (unsigned int)step, width);
    if ((int)threadIdx.x % width >= step) sum += other;
  }
  out[threadIdx.x] = (float)sum;
}

__global__ void votes(float* out) {
  const unsigned int even = __ballot_sync(kAll, threadIdx.x % 2 == 0);
  const int any = __any_sync(kAll, threadIdx.x == 31), all = __all_sync(kAll, threadIdx.x < 31);
  const double own = threadIdx.x, last = __shfl_down_sync(kAll, own, 31), first = __shfl_sync(kAll, own, 0);
  const int count = __syncthreads_count(threadIdx.x < 20);
  // Only half of the lanes meet here, with a mask that says so.
  const unsigned int low = threadIdx.x < 16 ? __ballot_sync(0xffffu, threadIdx.x < 3) : 7u;
  __syncwarp();
  if (threadIdx.x == 0) {
    const float found[] = {(float)__popc(even), (float)__ffs((int)even), (float)any, (float)all,
                           (float)last,         (float)first,            (float)count, (float)low};
    for (int i = 0; i < 8; ++i) out[i] = found[i];
  }
}

__global__ void shuffle_from_absent(float* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, (float)threadIdx.x, 16);
}

__global__ void masks_differ() { __syncwarp(threadIdx.x < 16 ? kAll : 0xfffffff0u); }

__global__ void indices(float* out) {
  const unsigned int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += (float)(1000 * block + thread);
}

// Each block adds its part; the one that finishes last adds the parts.
__global__ void last_block_sums(float* partial, float* out, unsigned int* finished) {
  partial[blockIdx.x] = (float)(blockIdx.x + 1);
  __threadfence();
  if (atomicInc(finished, gridDim.x - 1) != gridDim.x - 1) return;
  float total = 0;
  for (unsigned int block = 0; block < gridDim.x; ++block) total += partial[block];
  out[0] = total;
}

__global__ void uninitialised(float* out) {
  __shared__ float fixed[4];
  BDCORE_SHARED(float, dynamic);
  out[2 * blockIdx.x] = fixed[blockIdx.x];
  out[2 * blockIdx.x + 1] = dynamic[blockIdx.x];
  fixed[0] = fixed[1] = dynamic[0] = dynamic[1] = 1;  // not for the next block
}

__global__ void beyond_dynamic_shared() {
  BDCORE_SHARED(int, counts);
  counts[threadIdx.x] = 0;
}

__global__ void beyond_static_shared(float* out, int n) {
  __shared__ float row[8];
  for (int i = 0; i < n; ++i) row[i] = 1;
  out[0] = row[0];
}

__global__ void misaligned(float* out, int shift) {
  *reinterpret_cast<float4*>(out + shift) = make_float4(1, 2, 3, 4);
}

__global__ void asserts(int limit) { assert((int)threadIdx.x < limit); }

using Kernel = std::function<void(Numbers&)>;

template <int mistake>
void run_block_sum(Numbers& out) {
  Numbers ones(1000, 1.0f);
  out.resize(1);
  emulator::run(1, 128, 0, [&] { block_sum<mistake>(ones.data(), out.data(), (int)ones.size()); });
}

template <bool barrier>
void run_rotate(Numbers& out) {
  out.resize(64);
  emulator::run(1, 64, 0, [&] { rotate<barrier>(out.data(), 5); });
}

const std::map<std::string, Kernel> kernels = {
    {"block_sum", run_block_sum<none>},
    {"block_sum_no_barrier", run_block_sum<no_barrier>},
    {"block_sum_half_a_block", run_block_sum<half_a_block>},
    {"block_sum_some_return", run_block_sum<some_return>},
    {"block_sum_two_places", run_block_sum<two_places>},
    {"rotate", run_rotate<true>},
    {"rotate_no_barrier", run_rotate<false>},
    {"scan", [](Numbers& out) { out.resize(32), emulator::run(1, 32, 0, [&] { scan(out.data(), 8); }); }},
    {"votes", [](Numbers& out) { out.resize(8), emulator::run(1, 32, 0, [&] { votes(out.data()); }); }},
    {"shuffle_from_absent",
     [](Numbers& out) { out.resize(16), emulator::run(1, 32, 0, [&] { shuffle_from_absent(out.data()); }); }},
    {"masks_differ", [](Numbers&) { emulator::run(1, 32, 0, [] { masks_differ(); }); }},
    {"indices",
     [](Numbers& out) { out.resize(24 * 30), emulator::run({2, 3, 4}, {5, 3, 2}, 0, [&] { indices(out.data()); }); }},
    {"last_block_sums",
     [](Numbers& out) {
       Numbers partial(9, NAN);
       unsigned int finished = 0;
       out.resize(1);
       emulator::run(9, 1, 0, [&] { last_block_sums(partial.data(), out.data(), &finished); });
     }},
    {"uninitialised", [](Numbers& out) { out.resize(4), emulator::run(2, 1, 16, [&] { uninitialised(out.data()); }); }},
    {"beyond_dynamic_shared", [](Numbers&) { emulator::run(1, 9, 32, [] { beyond_dynamic_shared(); }); }},
    {"beyond_static_shared",
     [](Numbers& out) { out.resize(1), emulator::run(1, 1, 0, [&] { beyond_static_shared(out.data(), 9); }); }},
    {"beyond_a_tensor",
     [](Numbers& out) {
       Numbers ones(1000, 1.0f);
       out.resize(1);
       emulator::run(1, 128, 0, [&] { block_sum<none>(ones.data(), out.data(), 1001); });
     }},
    {"misaligned",
     [](Numbers& out) {
       out.resize(16);
       const int shift = reinterpret_cast<uintptr_t>(out.data()) % 16 == 0 ? 1 : 0;
       emulator::run(1, 1, 0, [&] { misaligned(out.data(), shift); });
     }},
    {"null", [](Numbers&) { emulator::run(1, 1, 0, [] { misaligned(nullptr, 0); }); }},
    {"wild",
     [](Numbers& out) {
       out.resize(1);
       emulator::run(2, 32, 0, [&] { out[(size_t)blockIdx.x * threadIdx.x << 50] = 1; });
     }},
    {"asserts", [](Numbers&) { emulator::run(2, 40, 0, [] { asserts(33); }); }},
    {"too_large_a_block", [](Numbers&) { emulator::run(1, {32, 33}, 0, [] {}); }},
    {"empty_grid", [](Numbers&) { emulator::run(0, 32, 0, [] {}); }},
    {"too_much_shared", [](Numbers&) { emulator::run(1, 32, 48 * 1024 + 1, [] {}); }},
};

}  // namespace

int main(int, char** arguments) {
  Numbers out;
  try {
    kernels.at(arguments[1])(out);
  } catch (const std::runtime_error& failure) {
    std::cerr << failure.what() << "\n";
    return 1;
  }
  for (const float number : out) std::cout << number << "\n";
}
