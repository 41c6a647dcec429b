#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "weights_testing.h"

namespace kimi {
namespace {

using test::Contents;
using test::CreateArena;
using test::Holds;
using test::MessageOf;
using test::Publish;
using test::SetContents;
using weights::ArenaReader;
using weights::ArenaWriter;
using weights::Header;
using weights::Lease;
using weights::LeaseEntry;
using weights::Placed;
using weights::ProcessId;
using weights::SlotState;

bool Has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void TestWordsTellWhatTheyWere() {
  const Placed placed{.version = Placed::kMostVersion, .slot = 7};
  CHECK(Placed::Unpack(placed.Pack()) == placed);
  CHECK(!Placed::Unpack(0));
  const SlotState state{.kind = SlotState::kReady, .version = 0};
  CHECK_EQ(SlotState::Unpack(state.Pack()).kind, SlotState::kReady);
  CHECK_EQ(SlotState::Unpack(state.Pack() ^ 1).kind, SlotState::kEmpty);
  const ProcessId id{.pid = (1u << 22) - 1, .started = (uint64_t{1} << 34) - 1};
  CHECK(ProcessId::Unpack(id.Pack()) == id);
}

void TestPublishedVersionsAreReadInPlace() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 3);
  ArenaWriter writer(folder / "a");
  ArenaReader reader(folder / "a");
  CHECK(!reader.Current());
  CHECK(Has(MessageOf<std::invalid_argument>([&] { reader.Acquire(); }), "serves nothing yet"));
  CHECK(Publish(writer, 0));
  CHECK(Publish(writer, 5));
  const Lease lease = reader.Acquire();
  CHECK_EQ(lease.placed.version, 5u);
  CHECK(Holds(reader, lease.placed));
  CHECK(!reader.FirstDamaged(lease.placed.slot, reader.Crcs(lease.placed.slot), 2));
  reader.Release(lease);
  CHECK_EQ(reader.description(), "two tensors");
  CHECK(Has(MessageOf<std::invalid_argument>([&] { writer.Begin(5); }), "versions only grow"));
  CHECK(Publish(writer, 6));
}

void TestASlotInUseIsNotWritten() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 3);
  ArenaWriter writer(folder / "a");
  ArenaReader reader(folder / "a");
  CHECK(Publish(writer, 1));
  const Lease slow = reader.Acquire();
  CHECK(Publish(writer, 2));
  CHECK(Publish(writer, 3));
  const Lease other = reader.Acquire();
  CHECK(Publish(writer, 4));   // It takes the slot of version 2, which has no reader.
  CHECK(!Publish(writer, 5));  // Versions 1 and 3 are leased, and 4 is served.
  CHECK(Holds(reader, slow.placed) && Holds(reader, other.placed));
  CHECK_EQ(reader.Holders().size(), 2u);
  CHECK_EQ(reader.Holders()[0].owner.pid, static_cast<uint32_t>(getpid()));
  reader.Release(slow);
  CHECK(Publish(writer, 5));
  CHECK(Holds(reader, other.placed));
  reader.Release(other);
}

void TestOneVersionIsWrittenAtATime() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 3);
  ArenaWriter writer(folder / "a");
  const auto slot = writer.Begin(1);
  CHECK(Has(MessageOf<std::logic_error>([&] { writer.Begin(2); }), "at once"));
  writer.Abandon(*slot);
  CHECK(!writer.Current());
  CHECK(Has(MessageOf<std::logic_error>([&] { writer.Write(*slot, {}, 1); }), "not being written"));
  const auto again = writer.Begin(1);
  CHECK(Has(MessageOf<std::logic_error>([&] { writer.Write(*again, {}, 1); }), "gap"));
  writer.Abandon(*again);
  CHECK(Publish(writer, 1));
  CHECK(Has(MessageOf<std::invalid_argument>([&] { ArenaWriter(folder / "a"); }), "already"));
}

// Runs `work` in a forked process, which then waits, and kills it without reaping it.
template <typename Work>
pid_t KilledAfter(const Work& work) {
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    work();
    if (write(ends[1], "x", 1) == 1) pause();
    _exit(1);
  }
  char byte;
  CHECK_EQ(read(ends[0], &byte, 1), 1);
  close(ends[0]);
  close(ends[1]);
  return pid;
}

void TestLeasesOfTheDeadAreTakenAway() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 2);
  ArenaWriter writer(folder / "a");
  CHECK(Publish(writer, 1));
  const pid_t pid = KilledAfter([&] { ArenaReader(folder / "a").Acquire(); });
  CHECK(Publish(writer, 2));
  CHECK(!Publish(writer, 3));  // The process is running.
  CHECK_EQ(writer.Holders().size(), 1u);
  kill(pid, SIGKILL);
  siginfo_t info;
  waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOWAIT);  // It stays a zombie.
  CHECK(Publish(writer, 3));
  CHECK(writer.Holders().empty());
  waitpid(pid, nullptr, 0);
}

void TestARecycledPidHoldsNothing() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 2);
  ArenaWriter writer(folder / "a");
  CHECK(Publish(writer, 1));
  const uint32_t held = writer.Current()->slot;
  CHECK(Publish(writer, 2));
  auto id = ProcessId::OfThisProcess();
  CHECK(id.IsAlive() && id.started > 0);
  id.started -= 1;  // Another process had this pid before.
  CHECK(!id.IsAlive());
  LeaseEntry entry{};
  entry.owner = entry.owner_twin = Seal(id.Pack());
  entry.hold = entry.hold_twin = Placed{.version = 1, .slot = held}.Pack();
  const MappedFile shared(folder / "a", MappedFile::Mode::kShare);
  std::memcpy(shared.data() + weights::kLeasesAt, &entry, sizeof(entry));
  CHECK(Publish(writer, 3));
}

void TestEveryLeaseCanBeTaken() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 2);
  ArenaWriter writer(folder / "a");
  CHECK(Publish(writer, 1));
  std::vector<Lease> leases;
  for (uint32_t i = 0; i < weights::kLeases; ++i) leases.push_back(writer.Acquire());
  CHECK(Has(MessageOf<std::invalid_argument>([&] { writer.Acquire(); }), "no lease left"));
  for (const Lease& lease : leases) writer.Release(lease);
  writer.Release(writer.Acquire());
}

// Flips every bit of each word of a lease, one at a time: the slot stays leased.
void TestADamagedLeaseHoldsOn() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 2);
  ArenaWriter writer(folder / "a");
  CHECK(Publish(writer, 1));
  const Lease lease = writer.Acquire();
  CHECK(Publish(writer, 2));
  const MappedFile shared(folder / "a", MappedFile::Mode::kShare);
  auto* words = reinterpret_cast<uint64_t*>(shared.data() + weights::kLeasesAt +
                                            lease.entry * sizeof(LeaseEntry));
  for (size_t bit = 0; bit < 4 * 64; ++bit) {
    words[bit / 64] ^= uint64_t{1} << bit % 64;
    CHECK(!Publish(writer, 3));
    words[bit / 64] ^= uint64_t{1} << bit % 64;
  }
  writer.Release(lease);
  // A flipped bit in a free entry has no effect.
  for (size_t bit = 0; bit < 4 * 64; ++bit) {
    words[bit / 64] ^= uint64_t{1} << bit % 64;
    CHECK(Publish(writer, 3 + bit));
    std::memset(words, 0, sizeof(LeaseEntry));
  }
}

// A writer dies at each stage: what it had begun is discarded, and what was served is still served.
void TestAWriterThatDies() {
  for (int stage = 0; stage < 3; ++stage) {
    const test::TemporaryFolder folder;
    CreateArena(folder / "a", 2);
    {
      ArenaWriter writer(folder / "a");
      CHECK(Publish(writer, 1));
    }
    const pid_t pid = KilledAfter([&] {
      auto* writer =
          new ArenaWriter(folder / "a");  // Leaked, so that it lives until the process ends.
      const auto slot = *writer->Begin(2);
      if (stage == 0) return;
      const auto values = test::ValuesOf(2);
      const auto crcs = writer->Write(slot, test::SourcesOf(values), 1);
      if (stage == 1) return;
      writer->Commit(slot, 2, crcs);
    });
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    ArenaWriter writer(folder / "a");
    const uint64_t served = stage == 2 ? 2 : 1;
    CHECK_EQ(writer.Current()->version, served);
    CHECK(Holds(writer, *writer.Current()));
    CHECK(Publish(writer, served + 1));
    CHECK(Holds(writer, *writer.Current()));
  }
}

// Flips bits in each region of a file that serves version 2, while readers have it open.
void TestFlippedBitsOfTheHeader() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 3);
  ArenaWriter writer(folder / "a");
  CHECK(Publish(writer, 1));
  CHECK(Publish(writer, 2));
  const std::string sound = Contents(folder / "a");
  const MappedFile shared(folder / "a", MappedFile::Mode::kShare);
  auto* bytes = reinterpret_cast<unsigned char*>(shared.data());
  uint64_t version = 2;
  for (size_t bit = 0; bit < 8 * offsetof(Header, unused); ++bit) {
    std::string damaged = sound;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    SetContents(folder / "b", damaged);
    CHECK(!MessageOf<std::invalid_argument>([&] { ArenaReader(folder / "b"); }).empty());
  }
  for (const size_t at : {size_t{0}, size_t{40}, offsetof(Header, current),
                          offsetof(Header, current) + 7, offsetof(Header, slot)}) {
    bytes[at] ^= 4;
    const Lease lease = writer.Acquire();  // It is still served.
    CHECK_EQ(lease.placed.version, version);
    CHECK(Holds(writer, lease.placed));
    CHECK(Publish(writer, ++version));
    CHECK(Holds(writer, lease.placed));
    writer.Release(lease);
    ArenaReader again(folder / "a");  // Publishing has repaired it.
    CHECK_EQ(again.Current()->version, version);
  }
}

void TestCutFilesAreRefused() {
  const test::TemporaryFolder folder;
  CreateArena(folder / "a", 2);
  {
    ArenaWriter writer(folder / "a");
    CHECK(Publish(writer, 1));
  }
  const std::string sound = Contents(folder / "a");
  for (const size_t size : {size_t{0}, size_t{7}, size_t{100}, sizeof(Header) - 1}) {
    SetContents(folder / "b", sound.substr(0, size));
    CHECK(Has(MessageOf<std::invalid_argument>([&] { ArenaReader(folder / "b"); }),
              "not a weight arena"));
  }
  for (const size_t size : {sizeof(Header), size_t{4096}, sound.size() - 1}) {
    SetContents(folder / "b", sound.substr(0, size));
    CHECK(Has(MessageOf<std::invalid_argument>([&] { ArenaReader(folder / "b"); }), "cut off"));
  }
  ArenaReader reader(folder / "a");
  CHECK_EQ(truncate((folder / "a").c_str(), static_cast<off_t>(sound.size() - 4096)), 0);
  CHECK(Has(MessageOf<std::invalid_argument>([&] { reader.Acquire(); }), "while it was open"));
}

void TestSizesOutOfRange() {
  const test::TemporaryFolder folder;
  const auto create = [&](uint32_t slots, std::vector<weights::Region> regions) {
    return MessageOf<std::invalid_argument>(
        [&] { ArenaWriter::Create(folder / "x", slots, 100, {}, regions, ""); });
  };
  CHECK(Has(create(1, {}), "slots = 1"));
  CHECK(Has(create(9, {}), "slots = 9"));
  CHECK(Has(create(2, {{0, 10}, {8, 2}}), "overlaps"));
  CHECK(Has(create(2, {{96, 6}}), "beyond 100 bytes"));
  CHECK(Has(create(2, {{~uint64_t{0} - 1, 4}}), "beyond 100 bytes"));
  CHECK(create(2, {}).empty());
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestWordsTellWhatTheyWere();
  kimi::TestPublishedVersionsAreReadInPlace();
  kimi::TestASlotInUseIsNotWritten();
  kimi::TestOneVersionIsWrittenAtATime();
  kimi::TestLeasesOfTheDeadAreTakenAway();
  kimi::TestARecycledPidHoldsNothing();
  kimi::TestEveryLeaseCanBeTaken();
  kimi::TestADamagedLeaseHoldsOn();
  kimi::TestAWriterThatDies();
  kimi::TestFlippedBitsOfTheHeader();
  kimi::TestCutFilesAreRefused();
  kimi::TestSizesOutOfRange();
  return kimi::test::Failures();
}
