// The checksums of a buffer file. Each checksum starts from the trajectory, generation and position
// that its bytes belong to. Bytes that are intact but belong elsewhere therefore fail the check.
#ifndef KIMI_BUFFER_CHECKSUM_H_
#define KIMI_BUFFER_CHECKSUM_H_

#include <algorithm>
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

// The checksum of one segment; its tokens may be added in several parts.
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

// Whether a segment whose tokens lie in pages has the checksum of its record. `page_of(k)` returns
// the first byte of the trajectory's k-th page, or null if there is no such page.
template <typename PageOf>
bool HasItsCrc(int64_t trajectory_id, uint64_t generation, const Record& record, uint64_t per_page,
               const PageOf& page_of) {
  SegmentCrc crc(trajectory_id, generation, record);
  const uint64_t end = uint64_t{record.start} + record.length;
  for (uint64_t start = record.start, n; start < end; start += n) {
    const uint64_t offset = start % per_page;
    n = std::min(per_page - offset, end - start);
    const std::byte* page = page_of(start / per_page);
    if (page == nullptr) return false;
    crc.Add(reinterpret_cast<const int32_t*>(page) + offset,
            reinterpret_cast<const float*>(page + 4 * per_page) + offset,
            reinterpret_cast<const uint8_t*>(page + 8 * per_page) + offset, n);
  }
  return crc.value() == record.crc;
}

}  // namespace kimi

#endif  // KIMI_BUFFER_CHECKSUM_H_
