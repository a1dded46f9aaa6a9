// Philox4x32-10, a counter-based random generator (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011): the same key and counter give the same four numbers on every device and in every order.
// Without standard headers, because the CPU kernels include it (see cpu/simd.h).
#pragma once

#if defined(__CUDACC__)
#define BDCORE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define BDCORE_EVERYWHERE static inline
#endif

struct PhiloxNumbers {
  unsigned int value[4];
};

// key: the seed's low and high 32 bits; counter: which four numbers.
BDCORE_EVERYWHERE PhiloxNumbers philox(unsigned long long key, unsigned long long counter_low,
                                       unsigned long long counter_high) {
  unsigned int c0 = (unsigned int)counter_low, c1 = (unsigned int)(counter_low >> 32);
  unsigned int c2 = (unsigned int)counter_high, c3 = (unsigned int)(counter_high >> 32);
  unsigned int k0 = (unsigned int)key, k1 = (unsigned int)(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const unsigned long long a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
    c0 = (unsigned int)(b >> 32) ^ c1 ^ k0;
    c1 = (unsigned int)b;
    c2 = (unsigned int)(a >> 32) ^ c3 ^ k1;
    c3 = (unsigned int)a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}
