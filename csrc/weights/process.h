// Who a process is, so that one that died is told from one that got its number afterwards.
#ifndef KIMI_WEIGHTS_PROCESS_H_
#define KIMI_WEIGHTS_PROCESS_H_

#include <cstdint>
#include <optional>

namespace kimi::weights {

// A pid, and the low 34 bits of when it started, in clock ticks since the machine did (5 years).
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

  // Whether this very process can still touch memory. A zombie cannot; one that cannot be looked at
  // is taken to be alive.
  bool IsAlive() const;
};

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_PROCESS_H_
