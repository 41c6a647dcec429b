// The checksums of a buffer file. Each is seeded with what its bytes belong to, so that bytes that
// are whole but of another trajectory, generation or position do not pass.
#ifndef KIMI_BUFFER_CHECKSUM_H_
#define KIMI_BUFFER_CHECKSUM_H_

#include <cstddef>
#include <cstdint>

#include "base/crc32c.h"
#include "buffer/format.h"

namespace kimi {

inline uint32_t HeaderCrc(const Header& header) {
  return crc32c::Extend(0, &header, offsetof(Header, crc));
}

inline uint32_t IdentityCrc(uint64_t generation, int64_t trajectory_id, int64_t prompt_id,
                            int64_t group_id) {
  const uint64_t words[4] = {generation, static_cast<uint64_t>(trajectory_id),
                             static_cast<uint64_t>(prompt_id), static_cast<uint64_t>(group_id)};
  return crc32c::Extend(0, words, sizeof(words));
}

// Of one segment, whose tokens may come in parts.
class SegmentCrc {
 public:
  SegmentCrc(int64_t trajectory_id, uint64_t generation, const Record& record) {
    const uint64_t words[4] = {static_cast<uint64_t>(trajectory_id), generation,
                               uint64_t{record.start} | uint64_t{record.length} << 32,
                               static_cast<uint32_t>(record.policy_version)};
    seed_ = crc32c::Extend(0, words, sizeof(words));
  }

  void Add(const int32_t* token_ids, const float* logprobs, const uint8_t* mask, size_t n) {
    static_assert(sizeof(*token_ids) == sizeof(*logprobs));
    crc32c::ExtendTwo(&columns_[0], token_ids, &columns_[1], logprobs, n * sizeof(*token_ids));
    columns_[2] = crc32c::Extend(columns_[2], mask, n * sizeof(*mask));
  }

  uint32_t value() const { return crc32c::Extend(seed_, columns_, sizeof(columns_)); }

 private:
  uint32_t seed_;
  uint32_t columns_[3] = {0, 0, 0};
};

}  // namespace kimi

#endif  // KIMI_BUFFER_CHECKSUM_H_
