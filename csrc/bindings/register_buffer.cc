#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/py_buffer.h"
#include "bindings/register.h"
#include "buffer/draw.h"

namespace kimi {
namespace {

// A read-only array over memory that `owner` keeps in place.
template <typename T>
py::array ViewOf(const T* data, size_t n, const py::object& owner) {
  py::array_t<T> view(static_cast<py::ssize_t>(n), data, owner);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

// The tokens of one segment in place.
class SegmentView {
 public:
  SegmentView(std::shared_ptr<const BufferReader> buffer, const TrajectoryInfo& info,
              const Record& record, const std::vector<SegmentPart>& parts)
      : buffer_(std::move(buffer)), info_(info), record_(record) {
    // Keeps the file mapped while any array over it lives, also after close().
    const py::capsule owner(new std::shared_ptr<const BufferReader>(buffer_), [](void* pointer) {
      delete static_cast<std::shared_ptr<const BufferReader>*>(pointer);
    });
    for (const SegmentPart& part : parts) {
      parts_.append(py::make_tuple(ViewOf(part.token_ids, part.length, owner),
                                   ViewOf(part.logprobs, part.length, owner),
                                   ViewOf(part.mask, part.length, owner)));
    }
  }

  py::list parts() const { return parts_; }
  uint32_t start() const { return record_.start; }
  int32_t policy_version() const { return record_.policy_version; }
  bool is_current() const { return buffer_->IsCurrent(info_); }

 private:
  std::shared_ptr<const BufferReader> buffer_;
  TrajectoryInfo info_;
  Record record_;
  py::list parts_;
};

BufferSizes SizesOf(int64_t capacity_tokens, int64_t max_trajectories, int64_t page_tokens,
                    int64_t max_prompts, int64_t sync_interval_ms) {
  // Negative sizes are refused as 0 is, with the same words.
  const auto positive = [](int64_t size) {
    return static_cast<uint64_t>(std::max<int64_t>(size, 0));
  };
  return {.capacity_tokens = positive(capacity_tokens),
          .max_trajectories = positive(max_trajectories),
          .page_tokens = positive(page_tokens),
          .max_prompts = positive(max_prompts),
          .sync_interval_ms = positive(sync_interval_ms)};
}

// Copies trajectories end to end into arrays of at least so many entries.
py::tuple pack(const PyBuffer& buffer, const Array<int64_t>& trajectory_ids,
               std::optional<std::tuple<Array<int32_t>, Array<float>, Array<uint8_t>,
                                        Array<int32_t>, Array<int32_t>>>
                   out) {
  const auto reader = buffer.reader();
  const auto ids = SpanOf(trajectory_ids, "trajectory_ids");
  std::vector<TrajectoryInfo> infos;
  infos.reserve(ids.size());
  int64_t total = 0;
  for (const int64_t id : ids) total += infos.emplace_back(reader->Get(id)).commit.length;
  if (total > std::numeric_limits<int32_t>::max()) {
    throw py::value_error("Cannot pack " + std::to_string(total) +
                          " tokens: cu_seqlens counts up to 2^31 - 1; pack fewer at a time");
  }
  const auto count = static_cast<py::ssize_t>(ids.size()) + 1;
  if (!out) out.emplace(total, total, total, total, count);
  auto& [token_ids, logprobs, mask, policy_versions, cu_seqlens] = *out;
  const auto least =
      std::min({token_ids.size(), logprobs.size(), mask.size(), policy_versions.size()});
  if (least < total || cu_seqlens.size() < count) {
    throw py::value_error("Cannot pack " + std::to_string(total) + " tokens of " +
                          std::to_string(ids.size()) + " trajectories: out has room for " +
                          std::to_string(least) + " and " + std::to_string(cu_seqlens.size() - 1));
  }
  Destination to{.token_ids = token_ids.mutable_data(),
                 .logprobs = logprobs.mutable_data(),
                 .mask = mask.mutable_data(),
                 .policy_versions = policy_versions.mutable_data()};
  int32_t* ends = cu_seqlens.mutable_data();
  {
    const py::gil_scoped_release release;
    int32_t end = 0;
    *ends++ = end;
    for (const TrajectoryInfo& info : infos) {
      if (!reader->Read(info, to)) throw NotFound(info.trajectory_id);
      const uint32_t n = info.commit.length;
      to = {to.token_ids + n, to.logprobs + n, to.mask + n, to.policy_versions + n};
      *ends++ = end += static_cast<int32_t>(n);
    }
  }
  return py::make_tuple(token_ids, logprobs, mask, policy_versions, cu_seqlens, total);
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

std::vector<Record> RecordsOf(const BufferReader& reader, const TrajectoryInfo& info) {
  std::vector<Record> records;
  if (!reader.ReadRecords(info, records)) throw NotFound(info.trajectory_id);
  return records;
}

py::list segments(const PyBuffer& buffer, int64_t trajectory_id) {
  const auto reader = buffer.reader();
  py::list rows;
  for (const Record& record : RecordsOf(*reader, reader->Get(trajectory_id))) {
    rows.append(py::make_tuple(record.start, record.length, record.policy_version));
  }
  return rows;
}

SegmentView view(const PyBuffer& buffer, int64_t trajectory_id, size_t index) {
  const auto reader = buffer.reader();
  const TrajectoryInfo info = reader->Get(trajectory_id);
  if (index >= info.commit.segments) {
    throw py::index_error("Trajectory " + std::to_string(trajectory_id) + " has " +
                          std::to_string(info.commit.segments) + " segments, no number " +
                          std::to_string(index));
  }
  const Record record = RecordsOf(*reader, info)[index];
  std::vector<SegmentPart> parts;
  if (!reader->Locate(info, record, parts)) throw NotFound(trajectory_id);
  return {reader, info, record, parts};
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
                  "pages_free"_a = stats.pages_free, "page_tokens"_a = reader->layout().page_tokens,
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
                  "slots_lost"_a = found.slots_lost, "prompts_lost"_a = found.prompts_lost);
}

std::vector<int64_t> draw(const PyBuffer& buffer, size_t count, uint64_t seed, double floor,
                          double prior_weight) {
  if (!(floor > 0 && floor <= 1 && prior_weight > 0)) {
    throw py::value_error("floor = " + std::to_string(floor) +
                          ", prior_weight = " + std::to_string(prior_weight) +
                          ": floor must be above 0 and at most 1, prior_weight above 0");
  }
  const auto reader = buffer.reader();
  const py::gil_scoped_release release;
  return reader->DrawPrompts(count, seed, floor, prior_weight);
}

std::pair<uint32_t, float> prompt_counts(const PyBuffer& buffer, uint64_t prompt_id) {
  const auto reader = buffer.reader();
  if (prompt_id >= reader->layout().max_prompts) {
    throw py::index_error("No prompt " + std::to_string(prompt_id) + ": the file has room for " +
                          std::to_string(reader->layout().max_prompts) + ", numbered from 0");
  }
  return reader->PromptCounts(prompt_id);
}

void TranslateErrors(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const NotFound& missing) {
    py::set_error(PyExc_KeyError, missing.what());
  } catch (const std::system_error& fault) {
    // OSError chooses its subclass, FileNotFoundError say, by the number.
    PyErr_SetObject(PyExc_OSError, py::make_tuple(fault.code().value(), fault.what()).ptr());
  }
}

void register_reading(py::class_<PyBuffer>& buffer) {
  buffer
      .def("_read", &read, py::arg("trajectory_id"),
           "Prompt, group, token_ids, logprobs, mask, policy_versions and end reason.")
      .def("_pack", &pack, py::arg("trajectory_ids"), py::arg("out").noconvert() = py::none(),
           "The columns, cu_seqlens, and how many tokens were packed.")
      .def("_scan", &scan, "Trajectory, prompt, group, length, end reason; oldest first.")
      .def("_stats", &stats)
      .def("segments", &segments, py::arg("trajectory_id"),
           R"(The segments of a trajectory as (start, length, policy version), in order.

Raises:
    KeyError: there is no such trajectory.)")
      .def("view", &view, py::arg("trajectory_id"), py::arg("segment"),
           R"(One segment in place, nothing copied.

Raises:
    KeyError: there is no such trajectory.
    IndexError: it has no such segment.)")
      .def("draw", &draw, py::arg("count"), py::kw_only(), py::arg("seed"), py::arg("floor") = 0.05,
           py::arg("prior_weight") = 2.0,
           R"(Draw `count` different prompts of 0 .. max_prompts - 1, hard ones sooner.

The chance of a prompt is in proportion to `max(1 - rate, floor)`. Its rate is that of the responses
counted, mixed with `prior_weight` responses' worth of the rate of all prompts. The same seed and
counts give the same draw everywhere.

Raises:
    ValueError: `floor` is not in (0, 1], or `prior_weight` not above 0.)")
      .def("prompt_counts", &prompt_counts, py::arg("prompt_id"),
           R"(Responses counted for a prompt, and the sum of their correctness.

Raises:
    IndexError: `prompt_id` is not below `max_prompts`.)")
      .def_property_readonly(
          "recovery", &recovery,
          R"(What opening for writing found: `trajectories` and `tokens` that are sound, `cuts` as
(trajectory, tokens kept, tokens lost), `slots_lost` and `prompts_lost`.)");
}

}  // namespace

void register_buffer(py::module_& m) {
  py::register_local_exception_translator(&TranslateErrors);

  py::class_<SegmentView>(m, "SegmentView",
                          R"(The tokens of one segment where they lie in the file, read-only.

The arrays stay readable, but after an eviction other tokens may come to stand there: what was
computed from them holds if `is_current()` is true afterwards.)")
      .def_property_readonly("parts", &SegmentView::parts,
                             "(token_ids, logprobs, mask) for each page that it touches.")
      .def_property_readonly("start", &SegmentView::start, "Position of its first token.")
      .def_property_readonly("policy_version", &SegmentView::policy_version)
      .def("is_current", &SegmentView::is_current, "Whether it has not been evicted.");

  py::class_<PyBuffer> buffer(m, "RolloutBuffer",
                              "What kimi_core.buffer.RolloutBuffer is made from; use that one.");
  buffer.def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("readonly"))
      .def("close", &PyBuffer::close,
           "Unmap the file; once the views of it are gone, too. A closed buffer can be closed "
           "again.")
      .def_property_readonly("path", &PyBuffer::path)
      .def_property_readonly("readonly", &PyBuffer::readonly)
      .def_static(
          "_create",
          [](const std::string& path, int64_t capacity_tokens, int64_t max_trajectories,
             int64_t page_tokens, int64_t max_prompts, int64_t sync_interval_ms) {
            BufferWriter::Create(path, SizesOf(capacity_tokens, max_trajectories, page_tokens,
                                               max_prompts, sync_interval_ms));
          },
          py::arg("path"), py::arg("capacity_tokens"), py::arg("max_trajectories"),
          py::arg("page_tokens"), py::arg("max_prompts"), py::arg("sync_interval_ms"))
      .def_static(
          "file_bytes",
          [](int64_t capacity_tokens, int64_t max_trajectories, int64_t page_tokens) {
            return Layout(BufferWriter::HeaderOf(
                              SizesOf(capacity_tokens, max_trajectories, page_tokens, 0, 0)))
                .FileBytes();
          },
          py::arg("capacity_tokens"), py::arg("max_trajectories"), py::arg("page_tokens") = 256,
          "Bytes of the file of such a buffer, on disk and mapped.")
      .def_static(
          "tokens_taken",
          [](uint64_t tokens, uint64_t segments, int64_t page_tokens) {
            const Layout layout(BufferWriter::HeaderOf(SizesOf(1, 1, page_tokens, 0, 0)));
            return layout.PagesOf(tokens, segments) * layout.page_tokens;
          },
          py::arg("tokens"), py::arg("segments"), py::arg("page_tokens") = 256,
          R"(What a trajectory of so many tokens in so many segments takes of `capacity_tokens`.

It takes whole pages, and further ones to list its pages and segments where they are many.)");
  register_buffer_writing(buffer);
  register_reading(buffer);

  m.def(
      "balance",
      [](const std::vector<uint64_t>& sizes, uint64_t most) { return Balance(sizes, most); },
      py::arg("sizes"), py::arg("most"),
      R"(Distribute items over few batches of at most `most` each, of about the same size.

Returns the indices of each batch's items, ascending.

Raises:
    ValueError: one item alone is larger.)");
}

}  // namespace kimi
