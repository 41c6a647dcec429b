#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "attention/decode.h"
#include "bindings/py_instruction_set.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace kimi {
namespace {

using Query = py::array_t<float, py::array::c_style>;
using Lengths = py::array_t<int64_t, py::array::c_style>;

std::string shape_of(const py::array& array) { return py::str(array.attr("shape")); }

// `array` as keys or values. Only rows and heads may lie apart.
template <typename Stored>
Cached<Stored> stored(const py::array& array, const char* name) {
  const py::ssize_t size = array.itemsize();
  if (array.strides(3) != size || array.strides(2) != array.shape(3) * size) {
    throw py::value_error(std::string(name) +
                          " must hold the positions of a head one after the "
                          "other: only rows and heads may lie apart");
  }
  return {static_cast<const Stored*>(array.data()), array.strides(0) / size,
          array.strides(1) / size};
}

DecodeShape check(const Query& query, const py::array& keys, const py::array& values,
                  const Lengths& lengths, int64_t window, float scale, int threads) {
  if (query.ndim() != 3 || keys.ndim() != 4 || values.ndim() != 4 || query.size() == 0 ||
      !std::equal(keys.shape(), keys.shape() + 4, values.shape()) ||
      keys.shape(0) != query.shape(0) || keys.shape(3) != query.shape(2) || keys.shape(1) == 0 ||
      query.shape(1) % keys.shape(1) != 0) {
    throw py::value_error("query " + shape_of(query) + ", keys " + shape_of(keys) + " and values " +
                          shape_of(values) +
                          " must be [rows, heads, dim] and twice "
                          "[rows, kv_heads, positions, dim], heads a multiple of kv_heads");
  }
  const py::ssize_t rows = query.shape(0), positions = keys.shape(2);
  const int64_t* begin = lengths.data();
  if (lengths.ndim() != 1 || lengths.size() != rows ||
      std::any_of(begin, begin + rows, [&](int64_t n) { return n < 1 || n > positions; })) {
    throw py::value_error("lengths must be [" + std::to_string(rows) + "], each from 1 to " +
                          std::to_string(positions) + ", the positions that are stored");
  }
  if (window < 0 || threads < 1) {
    throw py::value_error("window = " + std::to_string(window) + ", threads = " +
                          std::to_string(threads) + ": window must be at least 0, threads 1");
  }
  return {rows, keys.shape(1), query.shape(1) / keys.shape(1), query.shape(2), window, scale};
}

Query decode_attention(const Query& query, const py::array& keys, const py::array& values,
                       const Lengths& lengths, float scale, int64_t window, int threads,
                       const std::optional<std::string>& instruction_set) {
  const DecodeShape shape = check(query, keys, values, lengths, window, scale, threads);
  const InstructionSet set = find_set(instruction_set);
  Query out({query.shape(0), query.shape(1), query.shape(2)});
  const auto run = [&]<typename Stored>() {
    const Cached<Stored> k = stored<Stored>(keys, "keys"), v = stored<Stored>(values, "values");
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    DecodeAttention(shape, query.data(), k, v, lengths.data(), to, threads, set);
  };
  if (keys.dtype().is(py::dtype::of<float>()) && values.dtype().is(py::dtype::of<float>())) {
    run.template operator()<float>();
  } else if (keys.dtype().is(py::dtype::of<uint16_t>()) &&
             values.dtype().is(py::dtype::of<uint16_t>())) {
    run.template operator()<Bfloat16>();
  } else {
    throw py::type_error("keys and values must both be float32, or the bits of bfloat16 as uint16");
  }
  return out;
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("decode_attention", &decode_attention, py::arg("query").noconvert(),
        py::arg("keys").noconvert(), py::arg("values").noconvert(), py::arg("lengths").noconvert(),
        py::kw_only(), py::arg("scale"), py::arg("window") = 0, py::arg("threads") = 1,
        py::arg("instruction_set") = py::none(),
        R"(Attention of one query per row: softmax(scale * q k) v over the row's own positions.

Keys and values are read once and never beyond a row's length. The result of a row does not depend
on the other rows or on the number of threads.

Args:
    query: float32 `[rows, heads, dim]`, C-contiguous.
    keys, values: float32, or the bits of bfloat16 as uint16, `[rows, kv_heads, positions, dim]`.
        Rows and heads may lie apart, as in a slice of larger storage.
    lengths: int64 `[rows]`, the positions that each row has, from 1 on.
    scale: factor on q k.
    window: each query sees at most this many positions, the last ones; 0 is all.
    threads: number of threads that share the work.
    instruction_set: one of `instruction_sets()`; None takes the fastest.

Returns:
    float32 `[rows, heads, dim]`.

Raises:
    TypeError: an array has another dtype or layout.
    ValueError: a shape or a length does not fit, or a number is out of range.)");
}

}  // namespace kimi
