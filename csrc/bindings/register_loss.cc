#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings/py_instruction_set.h"
#include "bindings/register.h"
#include "loss/logprob_tile.h"

namespace py = pybind11;

namespace kimi {
namespace {

// Arrays are never converted (noconvert below), because a tile is written in place and copying it
// would cost more than the pass.
using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Targets = py::array_t<int64_t, py::array::c_style>;

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet set : AvailableInstructionSets()) names.emplace_back(name_of(set));
  return names;
}

template <typename Array>
void check_length(const Array& array, py::ssize_t rows, const char* name) {
  if (array.ndim() != 1 || array.size() != rows) {
    throw py::value_error(std::string(name) + " must be one-dimensional with " +
                          std::to_string(rows) + " entries, to match the tile");
  }
}

TileHead check_head(const Floats& logits, const Targets& targets, const std::optional<Floats>& bias,
                    float softcap, float temperature, int threads) {
  if (logits.ndim() != 2 || logits.shape(1) == 0) {
    throw py::value_error("logits must be [rows, vocab] with at least 1 column");
  }
  const py::ssize_t rows = logits.shape(0), vocab = logits.shape(1);
  check_length(targets, rows, "targets");
  if (bias) check_length(*bias, vocab, "bias");
  if (!(temperature > 0) || !(softcap >= 0) || threads < 1) {
    throw py::value_error("temperature = " + std::to_string(temperature) + ", softcap = " +
                          std::to_string(softcap) + ", threads = " + std::to_string(threads) +
                          ": temperature must be above 0, softcap at least 0, threads at least 1");
  }
  const int64_t* begin = targets.data();
  if (std::any_of(begin, begin + rows, [&](int64_t id) { return id < -1 || id >= vocab; })) {
    throw py::value_error("targets must be in [0, " + std::to_string(vocab) +
                          "), or -1 for a row without one");
  }
  return {rows, vocab, bias ? bias->data() : nullptr, softcap, temperature};
}

py::tuple tile_statistics(const Floats& logits, const Targets& targets,
                          const std::optional<Floats>& bias, float softcap, float temperature,
                          int threads, const std::optional<std::string>& instruction_set) {
  const TileHead head = check_head(logits, targets, bias, softcap, temperature, threads);
  const InstructionSet set = find_set(instruction_set);
  Floats top(head.rows), picked(head.rows);
  Doubles total(head.rows), weighted(head.rows);
  const TileStatistics out{top.mutable_data(), total.mutable_data(), picked.mutable_data(),
                           weighted.mutable_data()};
  {
    py::gil_scoped_release release;
    FillTileStatistics(head, logits.data(), targets.data(), out, threads, set);
  }
  return py::make_tuple(top, total, picked, weighted);
}

void tile_gradient(Floats& logits, const Targets& targets, const Floats& top, const Doubles& total,
                   const Floats& outer, const std::optional<Floats>& bias, float softcap,
                   float temperature, int threads,
                   const std::optional<std::string>& instruction_set) {
  const TileHead head = check_head(logits, targets, bias, softcap, temperature, threads);
  const InstructionSet set = find_set(instruction_set);
  check_length(top, head.rows, "top");
  check_length(total, head.rows, "total");
  check_length(outer, head.rows, "outer");
  float* data = logits.mutable_data();  // May raise, so it needs the GIL.
  py::gil_scoped_release release;
  GradientInPlace(head, data, targets.data(), top.data(), total.data(), outer.data(), threads, set);
}

}  // namespace

void register_loss(py::module_& m) {
  m.def("instruction_sets", &instruction_sets,
        "The instruction sets of this processor that the tile passes can use, the fastest last.");

  m.def("tile_statistics", &tile_statistics, py::arg("logits").noconvert(),
        py::arg("targets").noconvert(), py::arg("bias").noconvert() = py::none(),
        py::arg("softcap") = 0.0f, py::arg("temperature") = 1.0f, py::arg("threads") = 1,
        py::arg("instruction_set") = py::none(),
        R"(Compute softmax statistics of each row of a tile of logits.

Scores are logits + bias, capped to softcap * tanh(scores / softcap) unless softcap is 0. Below, x is
(score - top) / temperature.

Args:
    logits: float32 `[rows, vocab]`, C-contiguous.
    targets: int64 `[rows]` in [0, vocab), or -1 if the target is in another part of the vocabulary.
    bias: float32 `[vocab]`; None adds nothing.
    softcap: the cap of the scores; 0 is no cap.
    temperature: divides the scores, above 0.
    threads: number of threads that share the rows.
    instruction_set: one of `instruction_sets()`; None takes the fastest.

Returns:
    top float32, the largest score; total float64, the sum of exp(x); picked float32, the target's x,
    or 0 without a target; weighted float64, the sum of exp(x) * x. Each `[rows]`.

Raises:
    TypeError: an array has another dtype or layout.
    ValueError: a shape does not fit, a target is out of range, or a number is not positive.)");

  m.def("tile_gradient", &tile_gradient, py::arg("logits").noconvert(),
        py::arg("targets").noconvert(), py::arg("top").noconvert(), py::arg("total").noconvert(),
        py::arg("outer").noconvert(), py::arg("bias").noconvert() = py::none(),
        py::arg("softcap") = 0.0f, py::arg("temperature") = 1.0f, py::arg("threads") = 1,
        py::arg("instruction_set") = py::none(),
        R"(Overwrite logits with the gradient of sum(outer * logprob(targets)) with respect to them.

Args:
    logits, targets, bias, softcap, temperature, threads, instruction_set: as in `tile_statistics`.
    top, total: results of `tile_statistics`, for the whole vocabulary if the tile is a part of it.
    outer: float32 `[rows]`, the factor of each row's log-prob.

Raises:
    TypeError, ValueError: as `tile_statistics`, and ValueError if `logits` is read-only.)");
}

}  // namespace kimi
