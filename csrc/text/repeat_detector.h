// RepeatDetector notices when a growing token sequence goes round in a loop.
//
// It answers one question after every token: have the last `window` tokens now occurred `count`
// times in the sequence? Occurrences may overlap, need not be adjacent, and the one just completed
// is included. The rollout engine ends a response there instead of paying for the rest of the loop.
//
// Method: a rolling polynomial hash of the last `window` tokens, and an open-addressing table from
// each distinct window to the number of times it has occurred. A push costs O(1), plus comparing
// `window` tokens where the window was seen before; neither grows with the sequence.
//
// The hash only chooses where to look. Two windows are the same if their tokens are, so a collision
// costs time and never a wrong answer: model output is hostile input.
//
// Memory: 4 bytes a token, plus 16 bytes a slot and 4/3 to 8/3 slots a distinct window.
//
// Synchronisation: none. One thread at a time uses a detector; distinct detectors are independent.
#ifndef KIMI_TEXT_REPEAT_DETECTOR_H_
#define KIMI_TEXT_REPEAT_DETECTOR_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kimi {

class RepeatDetector {
 public:
  // The hash of a window is its tokens as digits in base kBase, modulo kPrime. Public so that the
  // tests can construct windows that collide.
  static constexpr uint64_t kPrime = (uint64_t{1} << 61) - 1;
  static constexpr uint64_t kBase = 0x0b4e0ef37bc32127;

  // Throws std::invalid_argument unless window >= 1 and count >= 2.
  RepeatDetector(int64_t window, int64_t count);

  RepeatDetector(const RepeatDetector&) = delete;
  RepeatDetector& operator=(const RepeatDetector&) = delete;

  // Appends one token. True if the last `window` tokens now stand at least `count` times.
  // REQUIRES: size() < 2^32 - 1.
  bool Push(int32_t token);

  // Appends all tokens, as a trajectory that is opened again does with its earlier ones. Returns
  // the index in `tokens` of the first at which Push would have been true, or -1.
  // REQUIRES: size() + tokens.size() < 2^32.
  int64_t Extend(std::span<const int32_t> tokens);

  // Forgets every token; window and count stay.
  void Reset();

  // Tokens pushed since the start or the last Reset.
  size_t size() const { return tokens_.size(); }
  int64_t window() const { return window_; }
  int64_t count() const { return count_; }

 private:
  // One distinct window: its hash, the end (exclusive) of its first occurrence, and how often it
  // has occurred. An unused slot has occurrences == 0.
  struct Slot {
    uint64_t hash = 0;
    uint32_t end = 0;
    uint32_t occurrences = 0;
  };

  void RollHash(int32_t token);
  Slot& FindSlot(uint64_t hash);
  bool IsLastWindow(const Slot& slot) const;
  void Grow();

  const int64_t window_;
  const int64_t count_;
  const uint64_t leading_power_;  // kBase^(window - 1): the weight of the token that leaves.

  std::vector<int32_t> tokens_;
  uint64_t hash_ = 0;  // Of the last min(window, size()) tokens.

  // Linear probing. Invariants: slots_.size() is a power of two; at most 3/4 of it are in use; no
  // unused slot lies between a window and the slot that its hash points to.
  std::vector<Slot> slots_;
  size_t used_ = 0;
};

}  // namespace kimi

#endif  // KIMI_TEXT_REPEAT_DETECTOR_H_
