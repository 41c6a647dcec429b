#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "bindings/py_buffer.h"

namespace kimi {
namespace {

// An append of more tokens takes over 10 microseconds and releases the GIL.
constexpr size_t kReleaseTokens = 4096;

EndReason ParseReason(const std::string& name) {
  const auto found = std::find(std::begin(kReasonNames) + 1, std::end(kReasonNames), name);
  if (found == std::end(kReasonNames)) {
    throw py::value_error("Cannot finish by '" + name + "': allowed are stop, length and repeat");
  }
  return static_cast<EndReason>(found - std::begin(kReasonNames));
}

EndReason ParseReason(const OptionalReason& name) {
  return name ? ParseReason(*name) : EndReason::kOpen;
}

void CheckColumns(const py::array& token_ids, const py::array& logprobs, const py::array& mask) {
  if (token_ids.ndim() == 1 && logprobs.ndim() == 1 && mask.ndim() == 1 &&
      logprobs.size() == token_ids.size() && mask.size() == token_ids.size()) {
    return;
  }
  throw py::value_error("Cannot append columns of different shapes: token_ids " +
                        ShapeOf(token_ids) + ", logprobs " + ShapeOf(logprobs) + ", mask " +
                        ShapeOf(mask) + "; give one-dimensional arrays of equal length");
}

// Converts as pybind11 converts an argument of type Array<T>, but takes an array that already fits
// as it is: numpy's conversion took longer than the append.
template <typename T>
Array<T> ColumnOf(const py::object& given, const char* name) {
  if (py::isinstance<py::array>(given)) {
    const auto array = py::reinterpret_borrow<py::array>(given);
    if (array.dtype().num() == py::dtype::num_of<T>() && (array.flags() & py::array::c_style)) {
      return py::reinterpret_borrow<Array<T>>(given);
    }
  }
  auto converted = Array<T>::ensure(given);
  if (!converted) {
    PyErr_Clear();
    const std::string wanted = py::str(py::dtype::of<T>());
    throw py::type_error(std::string(name) + " does not convert to " + wanted +
                         " without loss: give an array or a CPU tensor of " + wanted);
  }
  return converted;
}

// Takes positional arguments only, because pybind11 is slow with named ones.
uint64_t append(PyBuffer& buffer, int64_t trajectory_id, const py::object& given_ids,
                const py::object& given_logprobs, const py::object& given_mask,
                int32_t policy_version, const OptionalReason& end_reason,
                std::optional<uint64_t> lease) {
  const auto token_ids = ColumnOf<int32_t>(given_ids, "token_ids");
  const auto logprobs = ColumnOf<float>(given_logprobs, "logprobs");
  const auto mask = ColumnOf<uint8_t>(given_mask, "mask");
  CheckColumns(token_ids, logprobs, mask);
  BufferWriter& writer = buffer.writer();
  const NewSegment segment{.trajectory_id = trajectory_id,
                           .token_ids = token_ids.data(),
                           .logprobs = logprobs.data(),
                           .mask = mask.data(),
                           .length = static_cast<size_t>(token_ids.size()),
                           .policy_version = policy_version,
                           .reason = ParseReason(end_reason),
                           .lease = lease};
  uint64_t length = 0;
  std::optional<py::gil_scoped_release> release;  // Takes longer than a short append.
  if (segment.length > kReleaseTokens) release.emplace();
  writer.Append({&segment, 1}, &length);
  return length;
}

Array<int64_t> append_many(PyBuffer& buffer, const Array<int64_t>& trajectory_ids,
                           const Array<int32_t>& token_ids, const Array<float>& logprobs,
                           const Array<uint8_t>& mask, const Array<int32_t>& cu_seqlens,
                           const Array<int32_t>& policy_versions,
                           const std::optional<std::vector<OptionalReason>>& end_reasons,
                           const std::optional<std::vector<std::optional<uint64_t>>>& leases) {
  CheckColumns(token_ids, logprobs, mask);
  const auto ids = SpanOf(trajectory_ids, "trajectory_ids");
  const auto ends = SpanOf(cu_seqlens, "cu_seqlens"),
             versions = SpanOf(policy_versions, "policy_versions");
  const size_t n = ids.size();
  if (ends.size() != n + 1 || versions.size() != n || (end_reasons && end_reasons->size() != n) ||
      (leases && leases->size() != n)) {
    throw py::value_error("Cannot append " + std::to_string(n) +
                          " segments: give as many policy_versions (and end_reasons and leases, "
                          "if any), and one more entry of cu_seqlens");
  }
  if (ends.front() != 0 || ends.back() != token_ids.size() ||
      !std::is_sorted(ends.begin(), ends.end())) {
    throw py::value_error("cu_seqlens must rise from 0 to the number of tokens, " +
                          std::to_string(token_ids.size()));
  }
  BufferWriter& writer = buffer.writer();
  std::vector<NewSegment> segments;
  segments.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const auto start = static_cast<size_t>(ends[i]);
    segments.push_back({.trajectory_id = ids[i],
                        .token_ids = token_ids.data() + start,
                        .logprobs = logprobs.data() + start,
                        .mask = mask.data() + start,
                        .length = static_cast<size_t>(ends[i + 1]) - start,
                        .policy_version = versions[i],
                        .reason = end_reasons ? ParseReason((*end_reasons)[i]) : EndReason::kOpen,
                        .lease = leases ? (*leases)[i] : std::nullopt});
  }
  std::vector<uint64_t> lengths(n);
  {
    const py::gil_scoped_release release;
    writer.Append(segments, lengths.data());
  }
  Array<int64_t> result(static_cast<py::ssize_t>(n));
  std::copy(lengths.begin(), lengths.end(), result.mutable_data());
  return result;
}

void evict(PyBuffer& buffer, const std::vector<int64_t>& trajectory_ids) {
  BufferWriter& writer = buffer.writer();
  const py::gil_scoped_release release;
  writer.Evict(trajectory_ids);
}

}  // namespace

void register_buffer_writing(py::class_<PyBuffer>& buffer) {
  buffer
      .def(
          "begin",
          [](PyBuffer& self, int64_t prompt_id, int64_t group_id) {
            return self.writer().Begin(prompt_id, group_id);
          },
          py::arg("prompt_id"), py::arg("group_id"),
          R"(Open an empty trajectory and return its id. Ids count up from 0 and are never reused.

Raises:
    ValueError: every slot is in use.)")
      .def("_append", &append)
      .def(
          "append_many", &append_many, py::arg("trajectory_ids"), py::arg("token_ids"),
          py::arg("logprobs"), py::arg("mask"), py::arg("cu_seqlens"), py::arg("policy_versions"),
          py::kw_only(), py::arg("end_reasons") = py::none(), py::arg("leases") = py::none(),
          R"(Append n segments in order with one call, several times as fast as n calls of `append`.

An error leaves the buffer unchanged. A crash may keep only the first few segments.

Args:
    trajectory_ids: int64 `[n]`; an id may occur more than once.
    token_ids, logprobs, mask: int32, float32 and uint8 `[t]`, all segments end to end.
    cu_seqlens: int32 `[n + 1]`; segment `i` is tokens `cu_seqlens[i]:cu_seqlens[i + 1]`.
    policy_versions: int32 `[n]`.
    end_reasons, leases: one entry for each segment, or None.

Returns:
    int64 `[n]`: the length of the trajectory after each segment, in tokens.

Raises:
    KeyError, ValueError, OSError, TypeError: as `append`.)")
      .def(
          "finish",
          [](PyBuffer& self, int64_t trajectory_id, const std::string& reason) {
            self.writer().Finish(trajectory_id, ParseReason(reason));
          },
          py::arg("trajectory_id"), py::arg("reason"),
          R"(End a trajectory with reason "stop", "length" or "repeat". It takes no further segments.

Raises:
    KeyError: there is no such trajectory.
    ValueError: the reason is unknown, or the trajectory has already ended.)")
      .def(
          "resume",
          [](PyBuffer& self, int64_t trajectory_id) { return self.writer().Resume(trajectory_id); },
          py::arg("trajectory_id"),
          R"(Take a new lease on an unfinished trajectory. Appends that name an older lease are refused.

Raises:
    KeyError: there is no such trajectory.
    ValueError: the trajectory has ended.)")
      .def("evict", &evict, py::arg("trajectory_ids"),
           R"(Remove trajectories and free their pages. An id may occur more than once.

Raises:
    KeyError: one of them does not exist; then none is removed.)")
      .def(
          "flush", [](PyBuffer& self) { self.writer().Flush(); },
          py::call_guard<py::gil_scoped_release>(),
          R"(Return when everything appended so far is on disk.

Raises:
    OSError: the disk failed.)")
      .def(
          "snapshot",
          [](PyBuffer& self, const std::filesystem::path& path) {
            self.writer().Snapshot(path.string());
          },
          py::arg("path"), py::call_guard<py::gil_scoped_release>(),
          R"(Write a copy to `path`, which is on disk on return. Free pages take no disk space.

The file at `path` is replaced as a whole or not at all.

Raises:
    OSError: the disk is full or failed.)")
      .def_property(
          "mark", [](const PyBuffer& self) { return self.reader()->mark(); },
          [](PyBuffer& self, uint64_t mark) { self.writer().SetMark(mark); },
          "A number below 2^56 that the file's owner may set; 0 in a new file.");
}

}  // namespace kimi
