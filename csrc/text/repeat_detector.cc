#include "text/repeat_detector.h"

#include <algorithm>
#include <cassert>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace kimi {
namespace {

constexpr size_t kInitialSlots = 16;

// a * b modulo the prime 2^61 - 1, for a and b below it. The high and the low 61 bits of the
// product are added, because 2^61 is 1 modulo the prime.
uint64_t MulMod(uint64_t a, uint64_t b) {
  __extension__ using uint128 = unsigned __int128;
  const uint128 product = static_cast<uint128>(a) * b;
  const uint64_t sum = (static_cast<uint64_t>(product) & RepeatDetector::kPrime) +
                       static_cast<uint64_t>(product >> 61);
  return sum >= RepeatDetector::kPrime ? sum - RepeatDetector::kPrime : sum;
}

uint64_t PowMod(uint64_t base, uint64_t exponent) {
  uint64_t power = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) power = MulMod(power, base);
    base = MulMod(base, base);
  }
  return power;
}

// Token ids are not negative in practice, but every int32 gives a different digit.
uint64_t Digit(int32_t token) { return static_cast<uint32_t>(token); }

int64_t AtLeast(const char* name, int64_t value, int64_t bound) {
  if (value < bound) {
    throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) +
                                ": it must be at least " + std::to_string(bound));
  }
  return value;
}

}  // namespace

RepeatDetector::RepeatDetector(int64_t window, int64_t count)
    : window_(AtLeast("window", window, 1)),
      count_(AtLeast("count", count, 2)),
      leading_power_(PowMod(kBase, static_cast<uint64_t>(window_) - 1)),
      slots_(kInitialSlots) {}

bool RepeatDetector::Push(int32_t token) {
  assert(size() < std::numeric_limits<uint32_t>::max());
  RollHash(token);
  tokens_.push_back(token);
  if (size() < static_cast<size_t>(window_)) return false;

  Slot& slot = FindSlot(hash_);
  if (slot.occurrences > 0) return ++slot.occurrences >= count_;

  slot = {.hash = hash_, .end = static_cast<uint32_t>(size()), .occurrences = 1};
  if (4 * ++used_ > 3 * slots_.size()) Grow();
  return false;
}

int64_t RepeatDetector::Extend(std::span<const int32_t> tokens) {
  int64_t first = -1;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (Push(tokens[i]) && first < 0) first = static_cast<int64_t>(i);
  }
  return first;
}

// Adds `token` to the hash and removes the oldest one. REQUIRES: `token` is not yet in tokens_.
void RepeatDetector::RollHash(int32_t token) {
  if (size() >= static_cast<size_t>(window_)) {
    const int32_t leaving = tokens_[size() - static_cast<size_t>(window_)];
    hash_ = (hash_ + kPrime - MulMod(Digit(leaving), leading_power_)) % kPrime;
  }
  hash_ = (MulMod(hash_, kBase) + Digit(token)) % kPrime;
}

// Returns the slot of the window that ends at the last token, or the unused slot for it.
RepeatDetector::Slot& RepeatDetector::FindSlot(uint64_t hash) {
  const size_t last = slots_.size() - 1;
  size_t i = hash & last;
  while (slots_[i].occurrences > 0 && !(slots_[i].hash == hash && IsLastWindow(slots_[i]))) {
    i = (i + 1) & last;
  }
  return slots_[i];
}

bool RepeatDetector::IsLastWindow(const Slot& slot) const {
  return std::equal(tokens_.end() - window_, tokens_.end(), tokens_.begin() + slot.end - window_);
}

// Doubles the table. Its windows are distinct, so it compares none of them.
void RepeatDetector::Grow() {
  std::vector<Slot> larger(2 * slots_.size());
  const size_t last = larger.size() - 1;
  for (const Slot& slot : slots_) {
    if (slot.occurrences == 0) continue;
    size_t i = slot.hash & last;
    while (larger[i].occurrences > 0) i = (i + 1) & last;
    larger[i] = slot;
  }
  slots_ = std::move(larger);
}

}  // namespace kimi
