#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "buffer/checksum.h"
#include "buffer/writer.h"
#include "buffer_testing.h"
#include "check.h"

namespace kimi {
namespace {

using test::AppendNext;
using test::IsSound;
using test::MessageOf;
using test::Tokens;

BufferSizes Sizes(uint64_t tokens, uint64_t trajectories, uint64_t page_tokens = 8) {
  return {.capacity_tokens = tokens, .max_trajectories = trajectories, .page_tokens = page_tokens};
}

std::set<int64_t> Ids(const BufferReader& buffer) {
  std::set<int64_t> ids;
  for (const auto& info : buffer.Scan()) ids.insert(info.trajectory_id);
  return ids;
}

void TestSealedWordsNoticeEveryFlippedBit() {
  for (const uint64_t value : {uint64_t{0}, uint64_t{1}, uint64_t{0x123456789abcde}}) {
    CHECK_EQ(Unseal(Seal(value)).value(), value);
    for (int bit = 0; bit < 64; ++bit) CHECK(!Unseal(Seal(value) ^ uint64_t{1} << bit));
  }
  const Commit commit{.length = kMaxLength, .segments = kMaxSegments, .reason = EndReason::kRepeat};
  const auto back = Commit::Unpack(commit.Pack()).value();
  CHECK(back.length == kMaxLength && back.segments == kMaxSegments);
  CHECK(back.reason == EndReason::kRepeat);
}

// Odd lengths over odd numbers of pages, until records and page numbers fill further pages.
void TestTrajectoriesReadBack() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(12000, 5));
  BufferWriter writer(folder / "b");
  for (int64_t id = 0; id < 5; ++id) CHECK_EQ(writer.Begin(id, id / 2), id);
  uint64_t length[5] = {};
  for (uint64_t round = 0; round < 130; ++round) {
    for (int64_t id = 0; id < 5; ++id) {
      const uint64_t n = (round * 7 + static_cast<uint64_t>(id) * 3) % 19;
      length[id] += n;
      CHECK_EQ(AppendNext(writer, id, n, static_cast<int32_t>(round)), length[id]);
    }
  }
  const BufferReader reader(folder / "b");
  uint64_t tokens = 0, pages = 0;
  for (int64_t id = 0; id < 5; ++id) {
    const TrajectoryInfo info = reader.Get(id);
    CHECK_EQ(info.commit.length, length[id]);
    CHECK(info.commit.length > 36 * 8 && info.commit.segments > 12 + 12 * 4);
    CHECK(IsSound(reader, info) && IsSound(writer, info));
    tokens += info.commit.length;
    pages += reader.layout().PagesOf(info.commit.length, info.commit.segments);
  }
  const BufferStats stats = reader.Stats();
  CHECK_EQ(stats.tokens, tokens);
  CHECK_EQ(stats.pages - stats.pages_free, pages);
  CHECK_EQ(stats.tokens_by_version.size(), 130u);
  CHECK_EQ(stats.unfinished, 5u);
}

// Whole pages, one after another, hold the tokens that Read returns; an evicted one is refused.
void TestPagesAreCopiedWhole() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(100, 2));
  BufferWriter writer(folder / "b");
  const int64_t id = writer.Begin(0, 0);
  AppendNext(writer, id, 5, -1);
  AppendNext(writer, id, 20, 3);
  const TrajectoryInfo info = writer.Get(id);
  std::vector<Record> records;
  std::vector<std::byte> pages(4 * writer.layout().PageBytes());
  CHECK(writer.ReadPages(info, pages.data(), records));
  CHECK(records.size() == 2 && records[1].start == 5 && records[1].policy_version == 3);
  const Tokens expected(id, 0, 25);
  for (uint64_t i = 0; i < 25; ++i) {
    const std::byte* page = pages.data() + i / 8 * writer.layout().PageBytes();
    CHECK_EQ(reinterpret_cast<const int32_t*>(page)[i % 8], expected.ids[i]);
    CHECK_EQ(reinterpret_cast<const float*>(page + 32)[i % 8], expected.logprobs[i]);
    CHECK_EQ(static_cast<uint8_t>(page[64 + i % 8]), expected.mask[i]);
  }
  writer.Evict({{id}});
  CHECK(!writer.IsCurrent(info));
  CHECK(!writer.ReadPages(info, pages.data(), records));
  CHECK(!test::CopyOf(writer, info).read);
}

void TestErrorsComeBeforeAnythingIsAppended() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(32, 2));
  BufferWriter writer(folder / "b");
  const int64_t a = writer.Begin(0, 0), b = writer.Begin(0, 0);
  const auto refused = [&](std::vector<NewSegment> segments) {
    std::vector<uint64_t> lengths(segments.size());
    const auto append = [&] { writer.Append(segments, lengths.data()); };
    const std::string message = MessageOf<std::invalid_argument>(append);
    CHECK_EQ(writer.Stats().tokens, 0u);
    CHECK_EQ(writer.Stats().pages_free, 4u);
    return message;
  };
  const Tokens few(a, 0, 9), others(b, 0, 17);
  CHECK_EQ(refused({few.Segment(a, 0), others.Segment(b, 0)}),
           "Cannot append 26 tokens: they take 5 pages of 8 tokens, and 4 of 4 are free; raise "
           "capacity_tokens or evict finished trajectories");
  Tokens broken(a, 9, 3);
  broken.logprobs[2] = std::numeric_limits<float>::quiet_NaN();
  CHECK_EQ(refused({few.Segment(a, 0), broken.Segment(a, 0)}),
           "Cannot append to trajectory 0: log-prob 2 of the segment is nan; the engine's weights "
           "or logits are broken");
  NewSegment last = few.Segment(a, 0);
  last.reason = EndReason::kStop;
  CHECK_EQ(refused({last, few.Segment(a, 0)}), "Cannot append to trajectory 0: it ended by 'stop'");
  NewSegment stale = few.Segment(a, 0);
  stale.lease = 0;
  CHECK_EQ(writer.Resume(a), 1u);
  CHECK_EQ(refused({stale}),
           "Cannot append to trajectory 0: lease 0 was given, but the newest lease is 1: another "
           "worker has resumed it");
  CHECK_EQ(MessageOf<NotFound>([&] { AppendNext(writer, 7, 1); }),
           "No trajectory 7: never begun, or evicted");
  CHECK_EQ(MessageOf<std::invalid_argument>([&] { writer.Begin(0, 0); }),
           "Cannot begin a trajectory: all 2 are in use; raise max_trajectories or evict finished "
           "ones");
}

void TestATrajectoryCannotOutgrowItsTables() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(4000, 1));
  BufferWriter writer(folder / "b");
  const int64_t id = writer.Begin(0, 0);
  const uint64_t longest = writer.layout().MaxLength(), most = writer.layout().MaxSegments();
  CHECK_EQ(longest, (32 + 16 * 18) * 8u);
  CHECK_EQ(most, 12 + (12 + 6 * 18) * 4u);
  CHECK_EQ(AppendNext(writer, id, longest - most + 1), longest - most + 1);
  for (uint64_t i = 1; i < most; ++i) AppendNext(writer, id, 1);
  CHECK_EQ(
      MessageOf<std::invalid_argument>([&] { AppendNext(writer, id, 1); }),
      "Cannot append to trajectory 0: it has 2560 tokens, and 1 more exceed the 2560 that a slot "
      "can list; raise page_tokens");
  CHECK(IsSound(writer, writer.Get(id)));
}

void TestEvictionFreesAllOrNothing() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(80, 8));
  BufferWriter writer(folder / "b");
  for (int i = 0; i < 5; ++i) AppendNext(writer, writer.Begin(0, 0), 16);
  CHECK_EQ(writer.Stats().pages_free, 0u);
  const std::vector<int64_t> unknown = {3, 9}, four = {3, 1, 3, 2, 0};
  CHECK_EQ(MessageOf<NotFound>([&] { writer.Evict(unknown); }),
           "No trajectory 9: never begun, or evicted");
  CHECK_EQ(Ids(writer).size(), 5u);
  writer.Evict(four);
  CHECK((Ids(writer) == std::set<int64_t>{4}));
  CHECK_EQ(writer.Stats().pages_free, 8u);
  // Begin finds the free slots around the one in use, and gives new ids.
  for (int64_t id = 5; id < 12; ++id) CHECK_EQ(writer.Begin(0, 0), id);
  for (int64_t id = 4; id < 12; ++id) CHECK(writer.Find(id).has_value());
}

// Ids wrap around the slots past trajectories that stay. Displaced trajectories are also found
// after a restart.
void TestIdsGoOnAcrossRestarts() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(400, 4));
  std::mt19937 random(3);
  int64_t next = 0;
  std::set<int64_t> alive;
  for (int round = 0; round < 30; ++round) {
    BufferWriter writer(folder / "b");
    while (alive.size() < 4) {
      CHECK_EQ(writer.Begin(0, 0), next);
      AppendNext(writer, next, random() % 30);
      alive.insert(next++);
    }
    for (const int64_t id : std::set<int64_t>(alive)) {
      if (random() % 3) continue;
      writer.Evict({{id}});
      alive.erase(id);
    }
    CHECK(Ids(BufferReader(folder / "b")) == alive);
    for (const int64_t id : alive) CHECK(IsSound(writer, writer.Get(id)));
  }
}

void TestOneWriterAtATimeAndNoBusyThread() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(8, 1));
  {
    const BufferWriter writer(folder / "b");
    CHECK(MessageOf<std::invalid_argument>([&] { BufferWriter(folder / "b"); })
              .ends_with("is open for writing already: close it there, stop that process, or open "
                         "it here with readonly=True"));
    const BufferReader reader(folder / "b");
  }
  const BufferWriter again(folder / "b");
}

void TestFilesThatAreNoSoundBufferAreRefused() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(8, 1));
  const std::string path = folder / "b", sound = test::Contents(path);
  const auto complaint = [&](const std::string& contents) {
    test::SetContents(path, contents);
    const std::string read = MessageOf<std::invalid_argument>([&] { BufferReader{path}; });
    CHECK_EQ(MessageOf<std::invalid_argument>([&] { BufferWriter{path}; }), read);
    return read.substr(std::min(read.size(), path.size() + 1));
  };
  CHECK_EQ(complaint(sound), "");
  CHECK_EQ(complaint(""), "is not a rollout buffer: it does not begin with KIMIROLL");
  CHECK_EQ(complaint("PK" + sound.substr(2)),
           "is not a rollout buffer: it does not begin with KIMIROLL");
  std::string newer = sound;
  newer[8] = 3;
  CHECK_EQ(
      complaint(newer),
      "has format version 3, and this kimi_core reads up to 2: open it with the kimi_core that "
      "wrote it, or a newer one");
  CHECK_EQ(complaint(sound.substr(0, sound.size() - 1)),
           "is cut off: it has 8191 of 8192 bytes; restore a snapshot");
  for (size_t at = 12; at < sizeof(Header); ++at) {
    std::string flipped = sound;
    flipped[at] = static_cast<char>(flipped[at] ^ 4);
    CHECK(at == 36 || at == 37 || at == 38 || at == 39 ||  // The unused word.
          complaint(flipped).starts_with("has a damaged header"));
  }
  CHECK(MessageOf<std::system_error>([&] {
          BufferReader{folder / "none"};
        }).starts_with("Cannot open "));
  CHECK(MessageOf<std::system_error>([&] {
          BufferWriter::Create(path, Sizes(8, 1));
        }).starts_with("Cannot create "));
}

// Files of version 1 have all pages from the start. They may have words between the header and the
// slots, and a sync interval. They open as before.
void TestAFileOfVersion1Opens() {
  const test::TemporaryFolder folder;
  const std::string path = folder / "b";
  Header header = BufferWriter::HeaderOf(Sizes(80, 3));
  header.reserved_words = 600;  // Two blocks of 4096 bytes.
  header.reserved_setting = 1000;
  header.version = 1;
  header.crc = HeaderCrc(header);
  const std::vector<uint64_t> counts(600, Seal(7));
  {
    NewFile file(path, Layout(header).MostBytes());
    file.Write(0, &header, sizeof(header));
    file.Write(kAlignment, counts.data(), 8 * counts.size());
    file.Publish(NewFile::Existing::kRefuse);
  }
  const std::string sound = test::Contents(path);
  test::SetContents(path, sound.substr(0, sound.size() - 1));
  CHECK(MessageOf<std::invalid_argument>([&] {
          BufferReader{path};
        }).ends_with("is cut off: it has 17103 of 17104 bytes; restore a snapshot"));
  test::SetContents(path, sound);
  BufferWriter writer(path);
  CHECK_EQ(writer.Stats().pages_allocated, 10u);
  for (int64_t id = 0; id < 3; ++id) AppendNext(writer, writer.Begin(0, 0), 20);
  const BufferReader reader(path);
  for (const auto& info : reader.Scan()) CHECK(IsSound(reader, info));
  CHECK_EQ(reader.Stats().tokens, 60u);
  const std::string words = test::Contents(path).substr(kAlignment, 8 * counts.size());
  CHECK(std::memcmp(words.data(), counts.data(), words.size()) == 0);  // Left as they were.
  writer.Snapshot(folder / "s");
  CHECK_EQ(test::Contents(folder / "s").size(), sound.size());
}

void TestASnapshotIsTheSameBuffer() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", Sizes(400, 4));
  BufferWriter writer(folder / "b");
  for (int64_t id = 0; id < 3; ++id) {
    writer.Begin(id, 0);
    AppendNext(writer, id, 50);
  }
  const std::vector<int64_t> gone = {1};
  writer.Evict(gone);
  writer.SetMark(17);
  writer.Snapshot(folder / "s");
  AppendNext(writer, 0, 5);
  writer.Snapshot(folder / "s");  // Replaces the first.
  const Layout& layout = writer.layout();
  CHECK_EQ(test::Contents(folder / "s").size(), layout.BytesWith(3 * 7));  // 50 tokens: 7 pages.
  BufferWriter copy(folder / "s");
  CHECK_EQ(copy.Get(0).commit.length, 55u);
  CHECK((Ids(copy) == std::set<int64_t>{0, 2}));
  for (const auto& info : copy.Scan()) CHECK(IsSound(copy, info));
  CHECK_EQ(copy.mark(), 17u);
  CHECK_EQ(copy.Begin(0, 0), 3);
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestSealedWordsNoticeEveryFlippedBit();
  kimi::TestTrajectoriesReadBack();
  kimi::TestPagesAreCopiedWhole();
  kimi::TestErrorsComeBeforeAnythingIsAppended();
  kimi::TestATrajectoryCannotOutgrowItsTables();
  kimi::TestEvictionFreesAllOrNothing();
  kimi::TestIdsGoOnAcrossRestarts();
  kimi::TestOneWriterAtATimeAndNoBusyThread();
  kimi::TestFilesThatAreNoSoundBufferAreRefused();
  kimi::TestAFileOfVersion1Opens();
  kimi::TestASnapshotIsTheSameBuffer();
  return kimi::test::Failures();
}
