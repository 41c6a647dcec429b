// Shared by the tests of the buffer: tokens whose values follow from trajectory and position.
#ifndef KIMI_TESTS_CPP_BUFFER_TESTING_H_
#define KIMI_TESTS_CPP_BUFFER_TESTING_H_

#include <cstdint>
#include <vector>

#include "buffer/writer.h"
#include "files.h"

namespace kimi::test {

// Tokens [start, start + n) of a trajectory.
struct Tokens {
  Tokens(int64_t id, uint64_t start, uint64_t n) {
    for (uint64_t i = start; i < start + n; ++i) {
      ids.push_back(static_cast<int32_t>(static_cast<uint64_t>(id) * 100003 + i));
      logprobs.push_back(-static_cast<float>(i % 97) - static_cast<float>(id % 89) / 128);
      mask.push_back(static_cast<uint8_t>((static_cast<uint64_t>(id) + i) % 5 != 0));
    }
  }
  NewSegment Segment(int64_t id, int32_t version) const {
    return {.trajectory_id = id,
            .token_ids = ids.data(),
            .logprobs = logprobs.data(),
            .mask = mask.data(),
            .length = ids.size(),
            .policy_version = version,
            .reason = EndReason::kOpen,
            .lease = std::nullopt};
  }
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  std::vector<uint8_t> mask;
};

// Appends the next `n` tokens of a trajectory.
inline uint64_t AppendNext(BufferWriter& writer, int64_t id, uint64_t n, int32_t version = 0) {
  const Tokens tokens(id, writer.Get(id).commit.length, n);
  const NewSegment segment = tokens.Segment(id, version);
  uint64_t length = 0;
  writer.Append({&segment, 1}, &length);
  return length;
}

struct Copy {
  Tokens tokens{0, 0, 0};
  std::vector<int32_t> versions;
  bool read = false;
};

inline Copy CopyOf(const BufferReader& buffer, const TrajectoryInfo& info) {
  Copy copy;
  copy.tokens.ids.resize(info.commit.length);
  copy.tokens.logprobs.resize(info.commit.length);
  copy.tokens.mask.resize(info.commit.length);
  copy.versions.resize(info.commit.length);
  copy.read = buffer.Read(info, {.token_ids = copy.tokens.ids.data(),
                                 .logprobs = copy.tokens.logprobs.data(),
                                 .mask = copy.tokens.mask.data(),
                                 .policy_versions = copy.versions.data()});
  return copy;
}

// Whether a trajectory holds exactly the tokens that belong there.
inline bool IsSound(const BufferReader& buffer, const TrajectoryInfo& info) {
  const Copy copy = CopyOf(buffer, info);
  const Tokens expected(info.trajectory_id, 0, info.commit.length);
  return copy.read && copy.tokens.ids == expected.ids &&
         copy.tokens.logprobs == expected.logprobs && copy.tokens.mask == expected.mask;
}

}  // namespace kimi::test

#endif  // KIMI_TESTS_CPP_BUFFER_TESTING_H_
