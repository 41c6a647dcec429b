// Readers take and release leases while a writer publishes as fast as it can. A lease holds one
// whole version, which does not change while it is held, and versions only grow. Under
// ThreadSanitizer this proves that no access to the shared words races.
#include <atomic>
#include <cstdint>
#include <iostream>
#include <thread>
#include <vector>

#include "check.h"
#include "weights_testing.h"

namespace kimi {
namespace {

constexpr uint64_t kVersions = 1000;
constexpr uint64_t kReads = 500;
constexpr int kReaders = 2;

struct Tally {
  uint64_t reads = 0, torn = 0, backwards = 0;
};

Tally ReadMany(weights::ArenaReader& arena, const std::atomic<bool>& done) {
  Tally tally;
  uint64_t newest = 0;
  while (!done || tally.reads < kReads) {
    const weights::Lease lease = arena.Acquire();
    tally.backwards += lease.placed.version < newest;
    newest = lease.placed.version;
    for (int look = 0; look < 3; ++look) {
      tally.torn += !test::Holds(arena, lease.placed);
      std::this_thread::yield();
    }
    tally.torn +=
        arena.FirstDamaged(lease.placed.slot, arena.Crcs(lease.placed.slot), 1).has_value();
    arena.Release(lease);
    ++tally.reads;
  }
  return tally;
}

void TestLeasesBesideAWriter() {
  const test::TemporaryFolder folder;
  test::CreateArena(folder / "a", 3);
  weights::ArenaWriter writer(folder / "a");
  CHECK(test::Publish(writer, 0));
  weights::ArenaReader other(folder / "a");
  std::atomic<bool> done = false;
  std::vector<Tally> tallies(kReaders);
  {
    std::vector<std::jthread> readers;
    for (size_t i = 0; i < kReaders; ++i) {
      // Some use the writer's mapping, because ThreadSanitizer sees both sides only there.
      weights::ArenaReader& arena = i == 0 ? other : writer;
      readers.emplace_back([&, i] { tallies[i] = ReadMany(arena, done); });
    }
    for (uint64_t version = 1; version <= kVersions;) {
      if (test::Publish(writer, version)) {
        ++version;
      } else {
        std::this_thread::yield();
      }
    }
    done = true;
  }
  uint64_t reads = 0;
  for (const Tally& tally : tallies) {
    CHECK_EQ(tally.torn, 0u);
    CHECK_EQ(tally.backwards, 0u);
    reads += tally.reads;
  }
  CHECK(writer.Holders().empty());
  std::cout << reads << " leases during " << kVersions << " versions\n";
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestLeasesBesideAWriter();
  return kimi::test::Failures();
}
