// What opening finds in a file that was damaged, or whose machine died.
#include <cstdint>
#include <filesystem>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer/checksum.h"
#include "buffer/writer.h"
#include "buffer_testing.h"
#include "check.h"

namespace kimi {
namespace {

using test::AppendNext;
using test::IsSound;

BufferSizes Sizes(uint64_t tokens, uint64_t trajectories, uint64_t page_tokens = 8) {
  return {.capacity_tokens = tokens, .max_trajectories = trajectories, .page_tokens = page_tokens};
}

// A header whose checksum is right can still be of another program. No size may divide by zero.
void TestSizesOfNoBufferAreRefused() {
  const test::TemporaryFolder folder;
  const std::string path = folder / "b";
  BufferWriter::Create(path, Sizes(80, 3));
  const std::string sound = test::Contents(path);
  const auto refuses = [&](uint32_t Header::* field, uint32_t value) {
    std::string changed = sound;
    auto& header = *reinterpret_cast<Header*>(changed.data());
    header.*field = value;
    header.crc = HeaderCrc(header);
    test::SetContents(path, changed);
    try {
      const BufferWriter writer(path);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what())
          .ends_with("has a damaged header (no buffer has its sizes): restore a snapshot");
    }
    return false;
  };
  for (const uint32_t value : {0u, 4u, 12u, 65544u}) CHECK(refuses(&Header::page_tokens, value));
  for (const uint32_t value : {0u, 1u << 31, ~0u}) {
    CHECK(refuses(&Header::pages, value));
    CHECK(refuses(&Header::max_trajectories, value));
  }
}

// If any bit flips, opening the file reports it, or none of its contents has changed.
void TestAFlippedBitIsNeverSilent() {
  const test::TemporaryFolder folder;
  const std::string path = folder / "b";
  BufferWriter::Create(path, Sizes(6000, 6));
  {
    BufferWriter writer(path);
    for (int64_t id = 0; id < 4; ++id) {
      writer.Begin(id, id);
      for (int i = 0; i < 80; ++i) AppendNext(writer, id, 9);
      writer.Finish(id, EndReason::kLength);
    }
    const std::vector<int64_t> gone = {1};
    writer.Evict(gone);
  }
  const std::string sound = test::Contents(path);
  std::mt19937_64 random(5);
  int noticed = 0;
  for (int trial = 0; trial < 400; ++trial) {
    std::string flipped = sound;
    // Half of them are in the header and the slots, which are a small part of the file.
    const uint64_t at = random() % (trial % 2 ? flipped.size() : 8192);
    flipped[at] = static_cast<char>(flipped[at] ^ (1 << (random() % 8)));
    test::SetContents(path, flipped);
    bool said = false;
    try {
      const BufferWriter writer(path);
      const Recovery& recovery = writer.recovery();
      said = !recovery.cuts.empty() || recovery.slots_lost;
      uint64_t tokens = 0;
      for (const auto& info : writer.Scan()) {
        CHECK(IsSound(writer, info));
        CHECK(info.prompt_id == info.trajectory_id && info.group_id == info.trajectory_id);
        tokens += info.commit.length;
        if (!said) CHECK(info.commit.reason == EndReason::kLength);
      }
      if (!said) CHECK_EQ(tokens, 3 * 80 * 9u);
    } catch (const std::invalid_argument&) {
      said = true;
    }
    noticed += said;
  }
  CHECK(noticed > 50);  // The other flips hit unused bytes.
}

// Reverts pages of 4 KiB to their state at the last sync, and sometimes the length of the file.
// Each trajectory keeps an intact prefix, and nothing is missing of what was synced and not
// evicted.
void TestLostPagesLeaveSoundPrefixes() {
  const test::TemporaryFolder folder;
  const std::string path = folder / "b";
  std::mt19937 random(9);
  uint64_t cuts = 0;
  for (int trial = 0; trial < 30; ++trial) {
    std::filesystem::remove(path);
    BufferWriter::Create(path, Sizes(20000, 40, 16));
    std::string synced, newest;
    std::set<int64_t> evicted;
    std::vector<uint64_t> length_at_sync;
    {
      BufferWriter writer(path);
      const auto work = [&](int steps) {
        for (int step = 0; step < steps; ++step) {
          const auto all = writer.Scan();
          if (all.size() < 30) {
            writer.Begin(0, 0);
          } else if (random() % 20 == 0) {
            const int64_t id = all[random() % all.size()].trajectory_id;
            writer.Evict({{id}});
            evicted.insert(id);
          } else if (writer.Stats().pages_free > 20) {
            AppendNext(writer, all[random() % all.size()].trajectory_id, random() % 120);
          }
        }
      };
      work(200);
      writer.Flush();
      synced = test::Contents(path);
      for (const auto& info : writer.Scan()) {
        length_at_sync.resize(static_cast<size_t>(info.trajectory_id) + 1);
        length_at_sync.back() = info.commit.length;
      }
      evicted.clear();
      work(100);
      newest = test::Contents(path);
    }
    const size_t synced_size = synced.size();
    synced.resize(newest.size());  // What a file gains is 0 until it is written.
    for (size_t at = 4096; at < newest.size(); at += 4096) {
      if (random() % 2) newest.replace(at, 4096, synced.substr(at, 4096));
    }
    if (random() % 2) newest.resize(synced_size + random() % (newest.size() - synced_size + 1));
    test::SetContents(path, newest);
    BufferWriter writer(path);
    CHECK_EQ(writer.recovery().slots_lost, 0u);
    cuts += writer.recovery().cuts.size();
    uint64_t tokens = 0;
    for (const auto& info : writer.Scan()) {
      CHECK(IsSound(writer, info));
      tokens += info.commit.length;
      const auto id = static_cast<size_t>(info.trajectory_id);
      if (id < length_at_sync.size() && !evicted.contains(info.trajectory_id)) {
        CHECK(info.commit.length >= length_at_sync[id]);
        length_at_sync[id] = 0;
      }
    }
    for (size_t id = 0; id < length_at_sync.size(); ++id) {
      CHECK(length_at_sync[id] == 0 || evicted.contains(static_cast<int64_t>(id)));
    }
    CHECK_EQ(writer.recovery().tokens, tokens);
    // The buffer goes on from there: no page belongs to two trajectories.
    for (const auto& info : writer.Scan()) {
      if (writer.Stats().pages_free > 10) AppendNext(writer, info.trajectory_id, 40);
    }
    for (const auto& info : writer.Scan()) CHECK(IsSound(writer, info));
  }
  CHECK(cuts > 30);
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestAFlippedBitIsNeverSilent();
  kimi::TestSizesOfNoBufferAreRefused();
  kimi::TestLostPagesLeaveSoundPrefixes();
  return kimi::test::Failures();
}
