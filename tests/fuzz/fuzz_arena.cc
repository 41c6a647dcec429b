// Opens damaged arena files: what is served is a version as it was published, or it is refused.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "../cpp/weights_testing.h"
#include "damaged_file.h"
#include "weights/arena.h"

namespace kimi::fuzz {
namespace {

constexpr uint64_t kNewest = 3;

std::string SoundFile(const std::string& path) {
  std::filesystem::remove(path);
  test::CreateArena(path, 3);
  {
    weights::ArenaWriter writer(path);
    for (uint64_t version = 1; version <= kNewest; ++version) test::Publish(writer, version);
    writer.Begin(kNewest + 1);  // A writer that died.
  }
  return test::Contents(path);
}

// Leases what is served and compares it with its checksums. The word that names the served version
// has one byte of checksum: damage to two of its bytes may name another version, and that is not
// found here.
void Read(weights::ArenaReader& reader, const weights::Placed& newest, bool must_be_sound) {
  reader.Holders();
  if (!reader.Current()) return;
  const weights::Lease lease = reader.Acquire();
  try {
    const auto crcs = reader.Crcs(lease.placed.slot);
    const bool intact = !reader.FirstDamaged(lease.placed.slot, crcs, 1);
    if (must_be_sound && intact && lease.placed == newest) {
      Require(test::Holds(reader, lease.placed));
    }
  } catch (const std::invalid_argument&) {
  }
  reader.Release(lease);
}

}  // namespace
}  // namespace kimi::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kimi;
  static const std::string path = fuzz::PathFor("arena");
  static const std::string sound = fuzz::SoundFile(path);
  static const weights::Placed newest = weights::ArenaReader(path).Current().value();
  const fuzz::Damaged damaged = fuzz::Damage(sound, data, size, offsetof(weights::Header, crc));
  test::SetContents(path, damaged.contents);
  try {
    {
      weights::ArenaReader reader(path);
      fuzz::Read(reader, newest, !damaged.resealed);
    }
    weights::ArenaWriter writer(path);
    const auto served = writer.Current();
    if (test::Publish(writer, served ? served->version + 1 : 10)) {
      fuzz::Read(writer, newest, false);
    }
  } catch (const std::invalid_argument&) {  // Refused.
  } catch (const std::system_error&) {
  }
  return 0;
}
