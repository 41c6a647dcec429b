#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/py_buffer.h"
#include "buffer/balance.h"
#include "cuda/gather.h"

namespace kimi {
namespace {

// Looks up trajectories to pack, and adds up their tokens.
std::vector<TrajectoryInfo> InfosOf(const BufferReader& reader, const Array<int64_t>& ids,
                                    int64_t& tokens) {
  std::vector<TrajectoryInfo> infos;
  tokens = 0;
  for (const int64_t id : SpanOf(ids, "trajectory_ids")) {
    tokens += infos.emplace_back(reader.Get(id)).commit.length;
  }
  if (tokens > std::numeric_limits<int32_t>::max()) {
    throw py::value_error("Cannot pack " + std::to_string(tokens) +
                          " tokens: cu_seqlens counts up to 2^31 - 1; pack fewer at a time");
  }
  return infos;
}

// Copies trajectories end to end into new arrays or into `out`, whose arrays may be longer.
py::tuple pack(const PyBuffer& buffer, const Array<int64_t>& trajectory_ids,
               std::optional<std::tuple<Array<int32_t>, Array<float>, Array<uint8_t>,
                                        Array<int32_t>, Array<int32_t>>>
                   out) {
  const auto reader = buffer.reader();
  int64_t total = 0;
  const auto infos = InfosOf(*reader, trajectory_ids, total);
  const auto count = static_cast<py::ssize_t>(infos.size()) + 1;
  if (!out) out.emplace(total, total, total, total, count);
  auto& [token_ids, logprobs, mask, policy_versions, cu_seqlens] = *out;
  const auto least =
      std::min({token_ids.size(), logprobs.size(), mask.size(), policy_versions.size()});
  if (least < total || cu_seqlens.size() < count) {
    throw py::value_error("Cannot pack " + std::to_string(total) + " tokens of " +
                          std::to_string(infos.size()) + " trajectories: out holds " +
                          std::to_string(least) + " and " + std::to_string(cu_seqlens.size() - 1) +
                          "; give longer arrays");
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

// Copies the pages of trajectories one after another into memory that `allocate(bytes)` returns, a
// uint8 array. The rest of the tuple says how to gather the tokens; see _C.gather_pages.
py::tuple stage(const PyBuffer& buffer, const Array<int64_t>& trajectory_ids,
                const py::function& allocate) {
  const auto reader = buffer.reader();
  const Layout& layout = reader->layout();
  int64_t tokens = 0;
  const auto infos = InfosOf(*reader, trajectory_ids, tokens);
  const auto n = static_cast<py::ssize_t>(infos.size());
  Array<int32_t> first_pages(n), cu_seqlens(n + 1);
  cu_seqlens.mutable_at(0) = 0;
  uint64_t pages = 0;
  for (py::ssize_t i = 0; i < n; ++i) {
    const uint32_t length = infos[static_cast<size_t>(i)].commit.length;
    first_pages.mutable_at(i) = static_cast<int32_t>(pages);
    cu_seqlens.mutable_at(i + 1) = cu_seqlens.at(i) + static_cast<int32_t>(length);
    pages += layout.TokenPages(length);
  }
  const auto bytes = static_cast<py::ssize_t>(pages * layout.PageBytes());
  const auto staged = allocate(bytes).cast<Array<uint8_t>>();
  if (staged.size() < bytes) throw py::value_error("allocate returned too few bytes");
  auto* to = reinterpret_cast<std::byte*>(Array<uint8_t>(staged).mutable_data());
  std::vector<int32_t> versions, lengths;
  {
    const py::gil_scoped_release release;
    std::vector<Record> records;
    for (const TrajectoryInfo& info : infos) {
      if (!reader->ReadPages(info, to, records)) throw NotFound(info.trajectory_id);
      to += layout.TokenPages(info.commit.length) * layout.PageBytes();
      for (const Record& record : records) {
        versions.push_back(record.policy_version);
        lengths.push_back(static_cast<int32_t>(record.length));
      }
    }
  }
  const auto count = static_cast<py::ssize_t>(versions.size());
  return py::make_tuple(staged, first_pages, cu_seqlens, Array<int32_t>(count, versions.data()),
                        Array<int32_t>(count, lengths.data()));
}

#if defined(KIMI_DEVICE_CODE)
constexpr bool kHasDeviceCode = true;
#else
constexpr bool kHasDeviceCode = false;
#endif

// Takes addresses as integers, because this module does not know torch's tensors.
void gather_pages(uintptr_t pages, int64_t page_tokens, uintptr_t first_pages, uintptr_t cu_seqlens,
                  int32_t sequences, int32_t tokens, uintptr_t token_ids, uintptr_t logprobs,
                  uintptr_t mask, std::optional<uintptr_t> stream) {
  const cuda::PagedSequences from{reinterpret_cast<const unsigned char*>(pages), page_tokens,
                                  reinterpret_cast<const int32_t*>(first_pages),
                                  reinterpret_cast<const int32_t*>(cu_seqlens), sequences};
  const cuda::PackedColumns to{reinterpret_cast<int32_t*>(token_ids),
                               reinterpret_cast<float*>(logprobs),
                               reinterpret_cast<uint8_t*>(mask)};
  if (!stream) {
    for (int32_t token = 0; token < tokens; ++token) cuda::GatherToken(from, token, to);
    return;
  }
#if defined(KIMI_DEVICE_CODE)
  cuda::Gather(from, tokens, to, reinterpret_cast<void*>(*stream));
#else
  throw std::runtime_error(
      "kimi_core was built without device code: build it with -DKIMI_CUDA=ON and nvcc");
#endif
}

}  // namespace

void register_buffer_packing(py::module_& m, py::class_<PyBuffer>& buffer) {
  buffer
      .def("_pack", &pack, py::arg("trajectory_ids"), py::arg("out").noconvert() = py::none(),
           "The four columns, cu_seqlens, and the number of tokens packed.")
      .def("_stage", &stage, py::arg("trajectory_ids"), py::arg("allocate"),
           R"(Copy whole pages into the uint8 array that `allocate(bytes)` returns.

Returns the array; int32 `[n]` the first page of each trajectory; int32 `[n + 1]` cu_seqlens; and
the policy version and the length of each segment, in packed order.)");
  m.def(
      "balance",
      [](const std::vector<uint64_t>& sizes, uint64_t most) { return Balance(sizes, most); },
      py::arg("sizes"), py::arg("most"),
      R"(Split items into few batches of about equal size, each at most `most`.

Returns the indices of the items of each batch, ascending.

Raises:
    ValueError: one item alone is larger than `most`.)");
  m.def(
      "has_device_code", [] { return kHasDeviceCode; },
      "Whether this module was built with CUDA kernels.");
  m.def("gather_pages", &gather_pages, py::arg("pages"), py::arg("page_tokens"),
        py::arg("first_pages"), py::arg("cu_seqlens"), py::arg("sequences"), py::arg("tokens"),
        py::arg("token_ids"), py::arg("logprobs"), py::arg("mask"), py::arg("stream"),
        R"(Gather staged pages into packed columns, on a CUDA stream or on the host.

On a stream the call only enqueues the work. All arrays are given by the addresses of their memory,
on the current device or on the host.

Args:
    pages: the pages that `RolloutBuffer._stage` copied, of `page_tokens` tokens each.
    first_pages: int32 `[sequences]`, the page where each sequence begins.
    cu_seqlens: int32 `[sequences + 1]`.
    sequences, tokens: the numbers of sequences and of their tokens.
    token_ids, logprobs, mask: int32, float32 and uint8 `[tokens]`, which are filled.
    stream: a cudaStream_t, 0 for the default stream; None gathers on the host.

Raises:
    RuntimeError: the launch failed, or this module has no device code.)");
}

}  // namespace kimi
