// The Python module bdcore.ops._host: what is compiled but no tensor operator.
#include <pybind11/pybind11.h>

#include "../cpu/level.h"

namespace py = pybind11;

void bind_lowest_k(py::module_& module);  // lowest_k.cpp

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host-side parts of bdcore's compiled operators.";
  module.def(
      "cpu_level",
      [] {
        switch (bdcore::cpu_level()) {
          case bdcore::Level::avx512: return "avx512";
          case bdcore::Level::avx2: return "avx2";
          default: return "baseline";
        }
      },
      "The instruction set that the CPU kernels use: avx512, avx2 or baseline.");
  bind_lowest_k(module);
}
