#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "base/crc32c.h"
#include "base/spawn.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace kimi {
namespace {

uint32_t crc32c_of(const py::buffer& data, uint32_t crc) {
  const py::buffer_info info = data.request();
  py::ssize_t expected = info.itemsize;
  for (py::ssize_t i = info.ndim - 1; i >= 0; --i) {
    if (info.strides[i] != expected && info.shape[i] > 1) {
      throw py::value_error("crc32c was given an array with gaps: give a contiguous one");
    }
    expected *= info.shape[i];
  }
  const py::gil_scoped_release release;
  return crc32c::Extend(crc, info.ptr, static_cast<size_t>(info.size * info.itemsize));
}

int spawn(std::vector<std::string> argv, std::array<int, 3> standard, std::vector<int> inherited,
          std::vector<int> cgroup_procs, std::optional<uint32_t> user) {
  if (argv.empty())
    throw py::value_error("argv is empty: its first word must be the program's path");
  try {
    return Spawn({std::move(argv), standard, std::move(inherited), std::move(cgroup_procs), user});
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.what());
    throw py::error_already_set();
  }
}

}  // namespace

void register_base(py::module_& m) {
  m.def("crc32c", &crc32c_of, py::arg("data"), py::arg("crc") = 0,
        "Extend `crc`, the CRC32C of earlier bytes, by the bytes of `data`. Start with 0.");
  m.def("spawn", &spawn, py::arg("argv"), py::kw_only(), py::arg("standard"), py::arg("inherited"),
        py::arg("cgroup_procs"), py::arg("user"),
        R"(Start a program without an environment and return its pid. This process is not copied.

The kernel kills it when the calling thread ends.

Args:
    argv: the path of the program, and its arguments.
    standard: descriptors that become its stdin, stdout and stderr, none of them 0, 1 or 2.
    inherited: other descriptors that it keeps under the same numbers.
    cgroup_procs: descriptors of `cgroup.procs`, open for writing, of the cgroups that it joins.
    user: its user id, group id and only group; None keeps those of this process.

Raises:
    OSError: a step failed. The message names the step, and there is no child.)");
}

}  // namespace kimi
