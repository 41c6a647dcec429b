// Leases is the table in an arena file by which readers keep their slots from being written.
//
// A lease outlives the process that took it, so it says which process that was; one whose process
// is gone counts for nothing and is taken away by whoever meets it.
//
// Synchronisation: none needed. Any number of threads and processes claim, release and look.
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
  std::optional<Placed> held;  // Nothing: it is about to take one, or has just let go.
};

class Leases {
 public:
  explicit Leases(LeaseEntry* entries) : entries_(entries) {}

  // Takes an entry for this process, holding nothing yet; nothing where all are taken.
  std::optional<uint32_t> Claim();

  // REQUIRES, of both: this process has claimed `entry`.
  //
  // Says that a slot is in use. It holds only if what is served has not changed since: the caller
  // looks again after this store, as the writer stores first and then looks for holders.
  void Hold(uint32_t entry, const Placed& placed);
  void Release(uint32_t entry);

  // Those whose process lives.
  std::vector<Holder> Living();

 private:
  LeaseEntry* entries_;
};

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_LEASES_H_
