#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "bindings/register.h"
#include "text/repeat_detector.h"

namespace py = pybind11;

namespace kimi {
namespace {

// Without forcecast, an int64 array raises TypeError instead of being cut to 32 bits silently. What
// converts safely (a list, int16, a strided view) is copied.
using TokenArray = py::array_t<int32_t, py::array::c_style>;

std::span<const int32_t> as_span(const TokenArray& token_ids) {
  if (token_ids.ndim() != 1) {
    throw py::value_error("token_ids has " + std::to_string(token_ids.ndim()) +
                          " dimensions: give an array [n]");
  }
  return {token_ids.data(), static_cast<size_t>(token_ids.size())};
}

int64_t extend(RepeatDetector& detector, const TokenArray& token_ids) {
  const auto tokens = as_span(token_ids);
  py::gil_scoped_release release;
  return detector.Extend(tokens);
}

// Takes references, because pybind11 would convert None to a null pointer. Keeps the GIL, because
// reading the list is half of the work.
py::array_t<bool> push_all(const std::vector<std::reference_wrapper<RepeatDetector>>& detectors,
                           const TokenArray& token_ids) {
  const auto tokens = as_span(token_ids);
  if (detectors.size() != tokens.size()) {
    throw py::value_error("Cannot push " + std::to_string(tokens.size()) + " tokens into " +
                          std::to_string(detectors.size()) + " detectors: give one token for each");
  }
  py::array_t<bool> repeats(static_cast<py::ssize_t>(tokens.size()));
  bool* out = repeats.mutable_data();
  for (size_t i = 0; i < tokens.size(); ++i) out[i] = detectors[i].get().Push(tokens[i]);
  return repeats;
}

}  // namespace

void register_text(py::module_& m) {
  py::class_<RepeatDetector>(m, "RepeatDetector", R"(Detects that a token sequence repeats itself.

After every token it knows whether the last `window` tokens have occurred `count` times in the
sequence. Occurrences may overlap, and the last one counts. The cost of a push does not grow with the
sequence. One thread at a time may use a detector.

Raises:
    ValueError: window < 1 or count < 2.)")
      .def(py::init<int64_t, int64_t>(), py::arg("window"), py::arg("count"))
      .def("push", &RepeatDetector::Push, py::arg("token"),
           "Append one token. Returns whether the last `window` tokens have occurred `count` times "
           "or "
           "more.")
      .def("extend", &extend, py::arg("token_ids"),
           R"(Append all tokens of an int32 `[n]` array.

Returns the index of the first token at which `push` would have returned True, or -1.

Raises:
    TypeError: `token_ids` does not convert to int32 without loss.
    ValueError: `token_ids` is not one-dimensional.)")
      .def("size", &RepeatDetector::size, "The number of tokens so far.");

  m.def("push_all", &push_all, py::arg("detectors"), py::arg("token_ids"),
        R"(Push `token_ids[i]` into `detectors[i]`, for a whole decoding step in one call.

Args:
    detectors: n detectors.
    token_ids: int32 `[n]`.

Returns:
    bool `[n]`: the result of each `push`.

Raises:
    TypeError: `token_ids` does not convert to int32 without loss, or an item of `detectors` is not
        a RepeatDetector.
    ValueError: the two differ in length, or `token_ids` is not one-dimensional.

An error leaves every detector unchanged.)");
}

}  // namespace kimi
