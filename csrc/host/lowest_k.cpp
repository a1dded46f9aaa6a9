// The class LowestK of bdcore.ops._host: lowest_k over losses that arrive in tiles.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../cpu/lowest_k.h"

namespace py = pybind11;

void bind_lowest_k(py::module_& module) {
  using Losses = py::array_t<double, py::array::c_style>;
  using Index = py::array_t<int64_t, py::array::c_style>;
  py::class_<bdcore::LowestK>(module, "LowestK", "The k smallest losses of a stream; bdcore.ops.LowestK explains it.")
      .def(py::init([](int64_t k) {
             if (k < 0) throw std::invalid_argument("k must be at least 0, got " + std::to_string(k));
             return bdcore::LowestK(k);
           }),
           py::arg("k"))
      .def(
          "add",
          [](bdcore::LowestK& lowest, const Losses& losses, const Index& index) {
            if (losses.ndim() != 1 || index.ndim() != 1 || losses.size() != index.size()) {
              throw std::invalid_argument("losses and index must be [n]");
            }
            const int64_t* numbers = index.data();
            lowest.add(losses.data(), losses.size(), [numbers](int64_t i) { return numbers[i]; });
          },
          py::arg("losses").noconvert(), py::arg("index").noconvert())
      .def("indices", [](bdcore::LowestK& lowest) {
        const std::vector<int64_t> found = lowest.indices();
        return Index(static_cast<py::ssize_t>(found.size()), found.data());
      });
}
