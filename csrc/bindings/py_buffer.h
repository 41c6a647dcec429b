// The buffer object that Python holds, and conversions, for the files of the buffer's bindings.
#ifndef KIMI_BINDINGS_PY_BUFFER_H_
#define KIMI_BINDINGS_PY_BUFFER_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "buffer/reader.h"
#include "buffer/writer.h"

namespace kimi {

namespace py = pybind11;

// Without forcecast, float64 log-probs raise TypeError instead of losing precision silently.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using OptionalReason = std::optional<std::string>;

inline OptionalReason NameOf(EndReason reason) {
  if (reason == EndReason::kOpen) return std::nullopt;
  return kReasonNames[static_cast<size_t>(reason)];
}

inline std::string ShapeOf(const py::array& array) {
  return py::repr(py::tuple(array.attr("shape"))).cast<std::string>();
}

template <typename T>
std::span<const T> SpanOf(const Array<T>& array, const char* name) {
  if (array.ndim() != 1) {
    throw py::value_error(std::string(name) + " has shape " + ShapeOf(array) +
                          ": give one dimension");
  }
  return {array.data(), static_cast<size_t>(array.size())};
}

// A reader or a writer, until it is closed.
class PyBuffer {
 public:
  PyBuffer(const std::string& path, bool readonly) : path_(path) {
    const py::gil_scoped_release release;
    if (readonly) {
      reader_ = std::make_shared<BufferReader>(path);
    } else {
      auto writer = std::make_shared<BufferWriter>(path);
      writer_ = writer.get();
      reader_ = std::move(writer);
    }
  }

  void close() {
    writer_ = nullptr;
    reader_.reset();
  }

  const std::string& path() const { return path_; }
  bool readonly() const { return writer_ == nullptr; }

  std::shared_ptr<const BufferReader> reader() const {
    if (!reader_) throw py::value_error(path_ + " is closed: open it again");
    return reader_;
  }

  BufferWriter& writer() const {
    reader();
    if (!writer_) {
      throw py::value_error(path_ +
                            " is open for reading only: open it with readonly=False to change it");
    }
    return *writer_;
  }

 private:
  std::string path_;
  std::shared_ptr<const BufferReader> reader_;
  BufferWriter* writer_ = nullptr;
};

// Add the methods that change a buffer, and those that pack one; each is in a file of that name.
void register_buffer_writing(py::class_<PyBuffer>& buffer);
void register_buffer_packing(py::module_& m, py::class_<PyBuffer>& buffer);

}  // namespace kimi

#endif  // KIMI_BINDINGS_PY_BUFFER_H_
