// Which instruction set the kernels use. Every kernel file is compiled once for each level; the choice is made when the
// library is loaded, so that one wheel runs on every processor of its architecture.
#pragma once

#include <cstdlib>
#include <cstring>

namespace bdcore {

enum class Level { baseline = 0, avx2 = 1, avx512 = 2 };

// The highest level that this processor has. ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it, as it does torch's own.
inline Level cpu_level() {
#if defined(__x86_64__)
  Level level = Level::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    level = Level::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      level = Level::avx512;
    }
  }
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted != nullptr) {
    if (std::strcmp(wanted, "default") == 0) return Level::baseline;
    if (std::strcmp(wanted, "avx2") == 0 && level > Level::avx2) return Level::avx2;
  }
  return level;
#else
  return Level::baseline;
#endif
}

// A kernel file defines one table of functions, BDCORE_TABLE(name), at each level; `BDCORE_DECLARE_TABLES(Type, name)`
// declares them all and `bdcore::chosen_name()`, the one to call.
#if defined(__x86_64__)
#define BDCORE_DECLARE_TABLES(Type, name)                            \
  namespace baseline { extern const Type name; }                     \
  namespace avx2 { extern const Type name; }                         \
  namespace avx512 { extern const Type name; }                       \
  inline const Type& chosen_##name() {                               \
    static const Level level = cpu_level();                          \
    return level == Level::avx512 ? avx512::name : level == Level::avx2 ? avx2::name : baseline::name; \
  }
#else
#define BDCORE_DECLARE_TABLES(Type, name)      \
  namespace baseline { extern const Type name; } \
  inline const Type& chosen_##name() { return baseline::name; }
#endif

}  // namespace bdcore
