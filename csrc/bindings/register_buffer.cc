#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "bindings/py_buffer.h"
#include "bindings/register.h"

namespace kimi {
namespace {

BufferSizes SizesOf(int64_t capacity_tokens, int64_t max_trajectories, int64_t page_tokens) {
  // A negative size becomes 0, which is refused with a message.
  const auto positive = [](int64_t size) {
    return static_cast<uint64_t>(std::max<int64_t>(size, 0));
  };
  return {.capacity_tokens = positive(capacity_tokens),
          .max_trajectories = positive(max_trajectories),
          .page_tokens = positive(page_tokens)};
}

py::tuple read(const PyBuffer& buffer, int64_t trajectory_id) {
  const auto reader = buffer.reader();
  const TrajectoryInfo info = reader->Get(trajectory_id);
  const auto n = static_cast<py::ssize_t>(info.commit.length);
  Array<int32_t> token_ids(n), policy_versions(n);
  Array<float> logprobs(n);
  Array<uint8_t> mask(n);
  const Destination to{.token_ids = token_ids.mutable_data(),
                       .logprobs = logprobs.mutable_data(),
                       .mask = mask.mutable_data(),
                       .policy_versions = policy_versions.mutable_data()};
  {
    const py::gil_scoped_release release;
    if (!reader->Read(info, to)) throw NotFound(trajectory_id);
  }
  return py::make_tuple(info.prompt_id, info.group_id, token_ids, logprobs, mask, policy_versions,
                        NameOf(info.commit.reason));
}

py::list scan(const PyBuffer& buffer) {
  py::list rows;
  for (const TrajectoryInfo& info : buffer.reader()->Scan()) {
    rows.append(py::make_tuple(info.trajectory_id, info.prompt_id, info.group_id,
                               info.commit.length, NameOf(info.commit.reason)));
  }
  return rows;
}

py::list segments(const PyBuffer& buffer, int64_t trajectory_id) {
  const auto reader = buffer.reader();
  std::vector<Record> records;
  if (!reader->ReadRecords(reader->Get(trajectory_id), records)) throw NotFound(trajectory_id);
  py::list rows;
  for (const Record& record : records) {
    rows.append(py::make_tuple(record.start, record.length, record.policy_version));
  }
  return rows;
}

py::dict stats(const PyBuffer& buffer) {
  const auto reader = buffer.reader();
  BufferStats stats;
  {
    const py::gil_scoped_release release;
    stats = reader->Stats();
  }
  using py::literals::operator""_a;
  return py::dict("trajectories"_a = stats.trajectories, "unfinished"_a = stats.unfinished,
                  "tokens"_a = stats.tokens, "segments"_a = stats.segments, "pages"_a = stats.pages,
                  "pages_free"_a = stats.pages_free, "pages_allocated"_a = stats.pages_allocated,
                  "page_tokens"_a = reader->layout().page_tokens,
                  "max_trajectories"_a = reader->layout().max_trajectories,
                  "tokens_by_version"_a = stats.tokens_by_version);
}

py::dict recovery(const PyBuffer& buffer) {
  const Recovery& found = buffer.writer().recovery();
  py::list cuts;
  for (const Recovery::Cut& cut : found.cuts) {
    cuts.append(py::make_tuple(cut.trajectory_id, cut.kept, cut.lost));
  }
  using py::literals::operator""_a;
  return py::dict("trajectories"_a = found.trajectories, "tokens"_a = found.tokens, "cuts"_a = cuts,
                  "slots_lost"_a = found.slots_lost);
}

void TranslateErrors(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const NotFound& missing) {
    py::set_error(PyExc_KeyError, missing.what());
  } catch (const std::system_error& fault) {
    // OSError chooses its subclass by the number, such as FileNotFoundError.
    PyErr_SetObject(PyExc_OSError, py::make_tuple(fault.code().value(), fault.what()).ptr());
  }
}

void register_reading(py::class_<PyBuffer>& buffer) {
  buffer
      .def("_read", &read, py::arg("trajectory_id"),
           "Prompt id, group id, token_ids, logprobs, mask, policy_versions and end reason.")
      .def("_scan", &scan,
           "Trajectory, prompt and group id, length and end reason of each trajectory, oldest "
           "first.")
      .def("_stats", &stats)
      .def("segments", &segments, py::arg("trajectory_id"),
           R"(The segments of a trajectory as (start, length, policy version), in order.

Raises:
    KeyError: there is no such trajectory.)")
      .def_property_readonly(
          "recovery", &recovery,
          R"(What opening for writing found, as a dict: the numbers of intact `trajectories` and `tokens`;
`cuts`, a list of (trajectory, tokens kept, tokens lost); and `slots_lost`, the number of slots with
damaged ids.)");
}

}  // namespace

void register_buffer(py::module_& m) {
  py::register_local_exception_translator(&TranslateErrors);

  py::class_<PyBuffer> buffer(m, "RolloutBuffer",
                              "The C++ base of kimi_core.buffer.RolloutBuffer; use that class.");
  buffer.def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("readonly"))
      .def("close", &PyBuffer::close,
           "Unmap the file, and let another process write it. Safe to call twice.")
      .def_property_readonly("path", &PyBuffer::path, "Path of the file, as given.")
      .def_property_readonly("readonly", &PyBuffer::readonly, "Whether it was opened to read only.")
      .def_property_readonly(
          "page_tokens", [](const PyBuffer& self) { return self.reader()->layout().page_tokens; },
          "Tokens in a page.")
      .def_static(
          "_create",
          [](const std::string& path, int64_t capacity_tokens, int64_t max_trajectories,
             int64_t page_tokens) {
            BufferWriter::Create(path, SizesOf(capacity_tokens, max_trajectories, page_tokens));
          },
          py::arg("path"), py::arg("capacity_tokens"), py::arg("max_trajectories"),
          py::arg("page_tokens"))
      .def_static(
          "file_bytes",
          [](int64_t capacity_tokens, int64_t max_trajectories, int64_t page_tokens) {
            return Layout(BufferWriter::HeaderOf(
                              SizesOf(capacity_tokens, max_trajectories, page_tokens)))
                .MostBytes();
          },
          py::arg("capacity_tokens"), py::arg("max_trajectories"), py::arg("page_tokens") = 256,
          "The most bytes that the file of a buffer of these sizes takes, on disk and in memory.")
      .def_static(
          "tokens_taken",
          [](uint64_t tokens, uint64_t segments, int64_t page_tokens) {
            const Layout layout(BufferWriter::HeaderOf(SizesOf(1, 1, page_tokens)));
            return layout.PagesOf(tokens, segments) * layout.page_tokens;
          },
          py::arg("tokens"), py::arg("segments"), py::arg("page_tokens") = 256,
          R"(The part of `capacity_tokens` that one trajectory takes, in tokens.

A trajectory takes whole pages. A long one takes further pages, which list its pages and segments.)");
  register_buffer_writing(buffer);
  register_buffer_packing(m, buffer);
  register_reading(buffer);
}

}  // namespace kimi
