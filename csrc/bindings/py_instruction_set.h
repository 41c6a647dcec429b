// Instruction sets by name, for the functions that take one.
#ifndef KIMI_BINDINGS_PY_INSTRUCTION_SET_H_
#define KIMI_BINDINGS_PY_INSTRUCTION_SET_H_

#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "base/instruction_set.h"

namespace kimi {

inline const char* name_of(InstructionSet set) {
  if (set == InstructionSet::kAvx512) return "avx512";
  return set == InstructionSet::kAvx2 ? "avx2" : "portable";
}

// The fastest one without a name. Raises ValueError if this processor lacks the one that is named.
inline InstructionSet find_set(const std::optional<std::string>& name) {
  static const std::vector<InstructionSet> sets = AvailableInstructionSets();
  if (!name) return sets.back();
  const auto found =
      std::find_if(sets.begin(), sets.end(), [&](auto set) { return *name == name_of(set); });
  if (found == sets.end()) {
    throw pybind11::value_error("This processor has no passes for '" + *name +
                                "': choose one that instruction_sets() lists");
  }
  return *found;
}

}  // namespace kimi

#endif  // KIMI_BINDINGS_PY_INSTRUCTION_SET_H_
