// Shared by the tests of the arena: contents that follow from the version.
#ifndef KIMI_TESTS_CPP_WEIGHTS_TESTING_H_
#define KIMI_TESTS_CPP_WEIGHTS_TESTING_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "files.h"
#include "weights/arena.h"

namespace kimi::test {

constexpr uint64_t kElements = 1000;
inline const std::vector<weights::Region> kRegions = {{0, 400}, {512, 3600}};
constexpr uint64_t kPayload = 4112;

inline void CreateArena(const std::string& path, uint32_t slots) {
  weights::ArenaWriter::Create(path, slots, kPayload, weights::Hash{7}, kRegions, "two tensors");
}

inline std::vector<float> ValuesOf(uint64_t version) {
  std::vector<float> values(kElements);
  for (uint64_t i = 0; i < kElements; ++i) values[i] = static_cast<float>(version * 1000 + i);
  return values;
}

inline std::vector<weights::Source> SourcesOf(const std::vector<float>& values) {
  using weights::DType;
  return {{values.data(), DType::kFloat32, DType::kFloat32, 1, 100, 100, 0},
          {values.data() + 100, DType::kFloat32, DType::kFloat32, 1, 900, 900, 512}};
}

// Returns whether a slot was idle.
inline bool Publish(weights::ArenaWriter& writer, uint64_t version) {
  const auto slot = writer.Begin(version);
  if (!slot) return false;
  const auto values = ValuesOf(version);
  writer.Commit(*slot, version, writer.Write(*slot, SourcesOf(values), 1));
  return true;
}

// Whether a slot holds exactly this version.
inline bool Holds(const weights::ArenaReader& reader, const weights::Placed& placed) {
  const auto values = ValuesOf(placed.version);
  const std::byte* payload = reader.payload(placed.slot);
  return std::memcmp(payload, values.data(), 400) == 0 &&
         std::memcmp(payload + 512, values.data() + 100, 3600) == 0;
}

}  // namespace kimi::test

#endif  // KIMI_TESTS_CPP_WEIGHTS_TESTING_H_
