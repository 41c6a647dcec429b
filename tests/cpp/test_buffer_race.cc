// Readers run while a writer evicts and reuses pages as fast as it can. A reader gets a whole
// trajectory, or learns that it was evicted. Under ThreadSanitizer this proves that no access
// races.
#include <atomic>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "buffer/writer.h"
#include "buffer_testing.h"
#include "check.h"

namespace kimi {
namespace {

constexpr uint64_t kReads = 10'000;
constexpr int kReaders = 3;
constexpr uint64_t kEvictions = 5'000;

struct Tally {
  uint64_t whole = 0, gone = 0, torn = 0;
};

// Reads trajectories at random until it has read enough of them whole, and enough were evicted.
Tally ReadMany(const BufferReader& buffer, const std::atomic<uint64_t>& evictions, uint32_t seed) {
  std::mt19937 random(seed);
  Tally tally;
  while (tally.whole < kReads / kReaders + 1 || evictions < kEvictions) {
    for (const TrajectoryInfo& info : buffer.Scan()) {
      if (random() % 2) continue;
      const test::Copy copy = test::CopyOf(buffer, info);
      const test::Tokens expected(info.trajectory_id, 0, info.commit.length);
      if (!copy.read) {
        ++tally.gone;
      } else if (copy.tokens.ids == expected.ids && copy.tokens.logprobs == expected.logprobs &&
                 copy.tokens.mask == expected.mask) {
        ++tally.whole;
      } else {
        ++tally.torn;
      }
    }
  }
  return tally;
}

void Write(BufferWriter& writer, std::atomic<uint64_t>& evictions, const std::atomic<bool>& stop) {
  std::mt19937 random(1);
  std::vector<int64_t> alive;
  while (!stop.load()) {
    if (alive.size() < 12) {
      alive.push_back(writer.Begin(0, 0));
    } else if (random() % 4 == 0) {
      const size_t which = random() % alive.size();
      writer.Evict({&alive[which], 1});
      alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(which));
      ++evictions;
    }
    const int64_t id = alive[random() % alive.size()];
    if (writer.Get(id).commit.length < 3000) test::AppendNext(writer, id, random() % 600);
  }
}

void TestReadersNeverSeeHalfATrajectory() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b",
                       {.capacity_tokens = 12 * 4000, .max_trajectories = 14, .page_tokens = 16});
  BufferWriter writer(folder / "b");
  const BufferReader other_mapping(folder / "b");
  std::atomic<bool> stop = false;
  std::atomic<uint64_t> evictions = 0;
  std::thread writing([&] { Write(writer, evictions, stop); });
  Tally tallies[kReaders];
  std::vector<std::thread> reading;
  for (int i = 0; i < kReaders; ++i) {
    // ThreadSanitizer sees races in one mapping only; another process would have a second one.
    const BufferReader& buffer = i < kReaders - 1 ? writer : other_mapping;
    reading.emplace_back([&, &buffer = buffer, i] {
      tallies[i] = ReadMany(buffer, evictions, static_cast<uint32_t>(i));
    });
  }
  for (std::thread& thread : reading) thread.join();
  stop = true;
  writing.join();
  Tally sum;
  for (const Tally& tally : tallies) {
    sum.whole += tally.whole;
    sum.gone += tally.gone;
    sum.torn += tally.torn;
  }
  std::cout << sum.whole << " reads whole, " << sum.gone << " of what was evicted meanwhile, "
            << sum.torn << " torn; " << evictions << " evictions\n";
  CHECK(sum.whole >= kReads);
  CHECK(sum.gone > 0);
  CHECK_EQ(sum.torn, 0u);
}

void TestASecondWritingThreadIsRefused() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b",
                       {.capacity_tokens = 64, .max_trajectories = 2, .page_tokens = 16});
  BufferWriter writer(folder / "b");
  std::atomic<bool> refused = false;
  std::thread other([&] {
    while (!refused) {
      try {
        writer.SetMark(1);
      } catch (const std::logic_error&) {
        refused = true;
      }
    }
  });
  while (!refused) {
    try {
      writer.Snapshot(folder / "s");
    } catch (const std::logic_error&) {
      refused = true;
    }
  }
  other.join();
  CHECK(refused);
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestReadersNeverSeeHalfATrajectory();
  kimi::TestASecondWritingThreadIsRefused();
  return kimi::test::Failures();
}
