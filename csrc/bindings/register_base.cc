#include <pybind11/pybind11.h>

#include <cstdint>

#include "base/crc32c.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace kimi {
namespace {

uint32_t crc32c_of(const py::buffer& data, uint32_t crc) {
  const py::buffer_info info = data.request();
  py::ssize_t expected = info.itemsize;
  for (py::ssize_t i = info.ndim - 1; i >= 0; --i) {
    if (info.strides[i] != expected && info.shape[i] > 1) {
      throw py::value_error("crc32c needs bytes that lie side by side: give a contiguous array");
    }
    expected *= info.shape[i];
  }
  const py::gil_scoped_release release;
  return crc32c::Extend(crc, info.ptr, static_cast<size_t>(info.size * info.itemsize));
}

}  // namespace

void register_base(py::module_& m) {
  m.def("crc32c", &crc32c_of, py::arg("data"), py::arg("crc") = 0,
        "The CRC32C of what `crc` is the CRC32C of, followed by the bytes of `data`.");
}

}  // namespace kimi
