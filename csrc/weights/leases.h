// Leases is the table in an arena file with which readers protect their slots from being written.
//
// An entry outlives the process that claimed it, so it names that process. An entry whose process
// has died has no effect, and any process that finds it frees it.
//
// Synchronisation: none needed. Any number of threads and processes may claim, release and look.
#ifndef KIMI_WEIGHTS_LEASES_H_
#define KIMI_WEIGHTS_LEASES_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "weights/format.h"
#include "weights/process.h"

namespace kimi::weights {

struct Holder {
  ProcessId owner;
  std::optional<Placed> held;  // No value: about to hold a slot, or just released.
};

class Leases {
 public:
  explicit Leases(LeaseEntry* entries) : entries_(entries) {}

  // Claims an entry for this process, which holds no slot yet. Returns nothing if all are taken.
  std::optional<uint32_t> Claim();

  // Both functions REQUIRE that this process has claimed `entry`.
  //
  // Hold marks a slot as in use. The caller must then check that the same version is still served,
  // because the writer stores the served version first and then looks for holders.
  void Hold(uint32_t entry, const Placed& placed);
  void Release(uint32_t entry);

  // The entries whose process is running.
  std::vector<Holder> Living();

 private:
  LeaseEntry* entries_;
};

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_LEASES_H_
