// RepeatDetector detects that a growing token sequence repeats itself.
//
// After every token it answers one question: have the last `window` tokens now occurred `count`
// times in the sequence? Occurrences may overlap and need not be adjacent, and the last one counts.
// The rollout engine ends a response there, which saves sampling the rest of the repetition.
//
// Method: a rolling polynomial hash of the last `window` tokens, and an open-addressing table from
// each distinct window to its number of occurrences. A push costs O(1), plus the comparison of
// `window` tokens if the window has occurred before. Neither cost grows with the sequence.
//
// The hash only chooses where to look. Windows are compared by their tokens, so a collision costs
// time but never gives a wrong answer, even on adversarial output.
//
// Memory: 4 bytes for each token, and 4/3 to 8/3 slots of 16 bytes for each distinct window.
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
  // The hash of a window takes its tokens as digits in base kBase, modulo kPrime. Public for the
  // tests, which construct windows that collide.
  static constexpr uint64_t kPrime = (uint64_t{1} << 61) - 1;
  static constexpr uint64_t kBase = 0x0b4e0ef37bc32127;

  // Throws std::invalid_argument unless window >= 1 and count >= 2.
  RepeatDetector(int64_t window, int64_t count);

  RepeatDetector(const RepeatDetector&) = delete;
  RepeatDetector& operator=(const RepeatDetector&) = delete;

  // Appends one token. Returns whether the last `window` tokens have occurred `count` times or
  // more. REQUIRES: size() < 2^32 - 1.
  bool Push(int32_t token);

  // Appends all tokens, such as the earlier tokens of a trajectory that continues. Returns the
  // index in `tokens` of the first one at which Push would have returned true, or -1. REQUIRES:
  // size() + tokens.size() < 2^32.
  int64_t Extend(std::span<const int32_t> tokens);

  // The number of tokens so far.
  size_t size() const { return tokens_.size(); }

 private:
  // One distinct window: its hash, the end (exclusive) of its first occurrence, and its number of
  // occurrences, which is 0 in an unused slot.
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
  const uint64_t leading_power_;  // kBase^(window - 1), the weight of the oldest token.

  std::vector<int32_t> tokens_;
  uint64_t hash_ = 0;  // Of the last min(window, size()) tokens.

  // Linear probing. Invariants: slots_.size() is a power of two; at most 3/4 of the slots are in
  // use; no unused slot lies between a window and the slot that its hash selects.
  std::vector<Slot> slots_;
  size_t used_ = 0;
};

}  // namespace kimi

#endif  // KIMI_TEXT_REPEAT_DETECTOR_H_
