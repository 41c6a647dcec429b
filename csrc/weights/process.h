// Identifies a process, and distinguishes it from a later one with the same pid.
#ifndef KIMI_WEIGHTS_PROCESS_H_
#define KIMI_WEIGHTS_PROCESS_H_

#include <cstdint>
#include <optional>

namespace kimi::weights {

// A pid, and the low 34 bits of the start time, in clock ticks since boot (enough for 5 years).
struct ProcessId {
  uint32_t pid = 0;
  uint64_t started = 0;

  static ProcessId OfThisProcess();

  // 56 bits; Linux has pids below 2^22.
  uint64_t Pack() const { return uint64_t{pid} | started << 22; }
  static ProcessId Unpack(uint64_t value) {
    return {.pid = static_cast<uint32_t>(value & ((1u << 22) - 1)), .started = value >> 22};
  }
  bool operator==(const ProcessId&) const = default;

  // Whether this process can still touch memory. A zombie cannot. A process that cannot be
  // inspected counts as alive.
  bool IsAlive() const;
};

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_PROCESS_H_
