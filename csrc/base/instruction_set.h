// The instruction sets that some passes are compiled for.
#ifndef KIMI_BASE_INSTRUCTION_SET_H_
#define KIMI_BASE_INSTRUCTION_SET_H_

#include <vector>

namespace kimi {

// The slowest first.
enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The instruction sets of this processor, the fastest last. Never empty.
std::vector<InstructionSet> AvailableInstructionSets();

}  // namespace kimi

#endif  // KIMI_BASE_INSTRUCTION_SET_H_
