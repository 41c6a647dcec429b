#include "base/instruction_set.h"

namespace kimi {

std::vector<InstructionSet> AvailableInstructionSets() {
  std::vector<InstructionSet> sets = {InstructionSet::kPortable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(InstructionSet::kAvx2);
    if (__builtin_cpu_supports("avx512f")) sets.push_back(InstructionSet::kAvx512);
  }
#endif
  return sets;
}

}  // namespace kimi
