#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/register.h"
#include "weights/arena.h"

namespace py = pybind11;

namespace kimi {
namespace {

using weights::ArenaReader;
using weights::ArenaWriter;
using weights::DType;
using weights::Region;
using weights::Source;

DType DTypeOf(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("dtype = " + name + ": allowed are float32, bfloat16 and float16");
}

// A lease that ends with this object. A forked child has a copy of the object, but the lease
// belongs to the parent, so only the process that took it releases it.
class PyLease {
 public:
  explicit PyLease(std::shared_ptr<ArenaReader> arena)
      : arena_(std::move(arena)), lease_(arena_->Acquire()), pid_(getpid()) {}
  ~PyLease() { release(); }

  PyLease(const PyLease&) = delete;
  PyLease& operator=(const PyLease&) = delete;

  void release() {
    if (held() && getpid() == pid_) arena_->Release(lease_);
    arena_.reset();
  }
  bool held() const { return arena_ != nullptr; }
  uint64_t version() const { return lease_.placed.version; }
  uint32_t slot() const { return lease_.placed.slot; }

 private:
  std::shared_ptr<ArenaReader> arena_;
  weights::Lease lease_;
  pid_t pid_;
};

class PyArena {
 public:
  PyArena(const std::string& path, bool readonly) : path_(path) {
    const py::gil_scoped_release release;
    if (!readonly) writer_ = std::make_shared<ArenaWriter>(path);
    reader_ = std::make_shared<ArenaReader>(path);
  }

  void close() {
    writer_.reset();
    reader_.reset();
  }

  const std::string& path() const { return path_; }
  bool readonly() const { return writer_ == nullptr; }

  const std::shared_ptr<ArenaReader>& reader() const {
    if (!reader_) throw py::value_error(path_ + " is closed: open it again");
    return reader_;
  }

  const std::shared_ptr<ArenaWriter>& writer() const {
    reader();
    if (!writer_) {
      throw py::value_error(path_ + " is open for reading: open it with readonly=False to publish");
    }
    return writer_;
  }

 private:
  std::string path_;
  // Two objects, so that leases and views, which outlive close(), do not keep the writer's lock.
  std::shared_ptr<ArenaReader> reader_;
  std::shared_ptr<ArenaWriter> writer_;
};

// The bytes of a slot. The array keeps `owner`, and with it the mapping, alive.
py::array_t<uint8_t> Bytes(const std::shared_ptr<ArenaReader>& owner, const std::byte* data) {
  const py::capsule kept(new std::shared_ptr<ArenaReader>(owner), [](void* pointer) {
    delete static_cast<std::shared_ptr<ArenaReader>*>(pointer);
  });
  const auto size = static_cast<py::ssize_t>(owner->payload_bytes());
  return py::array_t<uint8_t>(size, reinterpret_cast<const uint8_t*>(data), kept);
}

void CheckSlot(const PyArena& arena, uint32_t slot) {
  if (slot < arena.reader()->slots()) return;
  throw py::index_error("slot = " + std::to_string(slot) + ": " + arena.path() + " has " +
                        std::to_string(arena.reader()->slots()) + " slots");
}

// An array, the dtype of its elements, the dtype in the arena, and the offset in the slot.
using PySource = std::tuple<py::array, std::string, std::string, uint64_t>;

Source SourceOf(const PySource& given) {
  const auto& [array, from, to, offset] = given;
  Source source{.data = array.data(),
                .from = DTypeOf(from),
                .to = DTypeOf(to),
                .rows = 1,
                .columns = 1,
                .stride = 0,
                .offset = offset};
  const auto width = static_cast<py::ssize_t>(weights::SizeOf(source.from));
  if (source.from != source.to && source.from != DType::kFloat32) {
    throw py::value_error("Cannot cast " + from + " to " + to + ": only float32 is cast");
  }
  const bool fits = array.itemsize() == width && (array.ndim() == 1 || array.ndim() == 2) &&
                    array.strides(array.ndim() - 1) == width &&
                    (array.ndim() == 1 || array.strides(0) % width == 0);
  if (!fits && array.size() > 0) {
    throw py::value_error("A source must have one or two dimensions, and rows of contiguous " +
                          from + " elements");
  }
  source.columns = static_cast<uint64_t>(array.shape(array.ndim() - 1));
  if (array.ndim() == 2) {
    source.rows = static_cast<uint64_t>(array.shape(0));
    source.stride = static_cast<uint64_t>(array.strides(0) / width);
  }
  return source;
}

std::vector<uint32_t> write(const PyArena& arena, uint32_t slot, const std::vector<PySource>& given,
                            unsigned threads, size_t first, std::optional<size_t> count) {
  std::vector<Source> sources;
  sources.reserve(given.size());
  for (const PySource& source : given) sources.push_back(SourceOf(source));
  const auto writer = arena.writer();  // Keeps it alive if another thread closes the arena.
  const py::gil_scoped_release release;
  return writer->Write(slot, sources, threads, first, count);
}

void create(const std::string& path, int64_t slots, uint64_t payload_bytes,
            const py::bytes& layout_hash, const std::vector<std::pair<uint64_t, uint64_t>>& regions,
            const std::string& description) {
  weights::Hash hash{};
  const std::string_view given = layout_hash;
  if (given.size() != hash.size())
    throw py::value_error("layout_hash has " + std::to_string(given.size()) +
                          " bytes: it must have 32");
  std::copy(given.begin(), given.end(), hash.begin());
  std::vector<Region> places;
  for (const auto& [offset, bytes] : regions) places.push_back({offset, bytes});
  const auto count = static_cast<uint32_t>(std::clamp<int64_t>(slots, 0, weights::kMostSlots + 1));
  ArenaWriter::Create(path, count, payload_bytes, hash, places, description);
}

std::optional<uint64_t> active_version(const PyArena& arena) {
  const auto current = arena.reader()->Current();
  if (!current) return std::nullopt;
  return current->version;
}

// Pid, slot and version of each lease that holds one.
py::list holders(const PyArena& arena) {
  py::list rows;
  for (const auto& holder : arena.reader()->Holders()) {
    if (!holder.held) continue;
    rows.append(py::make_tuple(holder.owner.pid, holder.held->slot, holder.held->version));
  }
  return rows;
}

std::optional<size_t> first_damaged(const PyArena& arena, uint32_t slot,
                                    const std::vector<uint32_t>& crcs, unsigned threads) {
  CheckSlot(arena, slot);
  if (crcs.size() != arena.reader()->regions().size()) {
    throw py::value_error(std::to_string(crcs.size()) + " checksums for " +
                          std::to_string(arena.reader()->regions().size()) + " tensors");
  }
  const auto reader = arena.reader();
  const py::gil_scoped_release release;
  return reader->FirstDamaged(slot, crcs, threads);
}

void register_writing(py::class_<PyArena>& arena) {
  arena
      .def_static("_create", &create, py::arg("path"), py::arg("slots"), py::arg("payload_bytes"),
                  py::arg("layout_hash"), py::arg("regions"), py::arg("description"))
      .def(
          "_begin",
          [](const PyArena& self, uint64_t version) { return self.writer()->Begin(version); },
          py::arg("version"),
          "Take an idle slot to write `version` into. Returns None if no slot is idle now.")
      .def("_write", &write, py::arg("slot"), py::arg("sources"), py::arg("threads"),
           py::arg("first") = 0, py::arg("count") = py::none(),
           "Cast and copy sources (array, its dtype, the arena's dtype, offset) into `count` "
           "regions from `first` on, by default all. Returns the checksums of the regions.")
      .def(
          "_writable",
          [](const PyArena& self, uint32_t slot) {
            CheckSlot(self, slot);
            return Bytes(self.writer(), self.writer()->writable(slot));
          },
          py::arg("slot"))
      .def(
          "_commit",
          [](const PyArena& self, uint32_t slot, uint64_t version,
             const std::vector<uint32_t>& crcs) { self.writer()->Commit(slot, version, crcs); },
          py::arg("slot"), py::arg("version"), py::arg("crcs"))
      .def(
          "_abandon", [](const PyArena& self, uint32_t slot) { self.writer()->Abandon(slot); },
          py::arg("slot"));
}

}  // namespace

// The translator in register_buffer.cc turns a std::system_error into an OSError.
void register_weights(py::module_& m) {
  py::class_<PyLease>(m, "WeightLease",
                      "The C++ part of a lease; use kimi_core.weights.slots.Lease.")
      .def("release", &PyLease::release)
      .def_property_readonly("held", &PyLease::held)
      .def_property_readonly("version", &PyLease::version)
      .def_property_readonly("slot", &PyLease::slot);

  py::class_<PyArena> arena(m, "WeightArena",
                            "The C++ part of kimi_core.weights.arena.WeightArena; use that class.");
  arena.def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("readonly"))
      .def("close", &PyArena::close,
           "Let another process publish, and unmap the file as soon as no view or lease of it "
           "exists. Safe to call twice.")
      .def_property_readonly("path", &PyArena::path)
      .def_property_readonly("readonly", &PyArena::readonly)
      .def_property_readonly("slots", [](const PyArena& self) { return self.reader()->slots(); })
      .def_property_readonly("active_version", &active_version,
                             "The served version; None before the first one.")
      .def_property_readonly("_layout_hash",
                             [](const PyArena& self) {
                               const auto& hash = self.reader()->layout_hash();
                               return py::bytes(reinterpret_cast<const char*>(hash.data()),
                                                hash.size());
                             })
      .def_property_readonly("_description",
                             [](const PyArena& self) { return self.reader()->description(); })
      .def_property_readonly("_regions",
                             [](const PyArena& self) {
                               std::vector<std::pair<uint64_t, uint64_t>> places;
                               for (const Region& region : self.reader()->regions()) {
                                 places.emplace_back(region.offset, region.bytes);
                               }
                               return places;
                             })
      .def("_acquire", [](const PyArena& self) { return std::make_unique<PyLease>(self.reader()); })
      .def("_holders", &holders)
      .def(
          "_payload",
          [](const PyArena& self, uint32_t slot) {
            CheckSlot(self, slot);
            return Bytes(self.reader(), self.reader()->payload(slot));
          },
          py::arg("slot"),
          "The bytes of a slot. A store there is a segmentation fault, although the array is "
          "writable.")
      .def(
          "_crcs",
          [](const PyArena& self, uint32_t slot) {
            CheckSlot(self, slot);
            return self.reader()->Crcs(slot);
          },
          py::arg("slot"))
      .def("_first_damaged", &first_damaged, py::arg("slot"), py::arg("crcs"), py::arg("threads"));
  register_writing(arena);
}

}  // namespace kimi
