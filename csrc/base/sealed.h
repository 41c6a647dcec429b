// A sealed word is a value of 56 bits with the xor of its bytes in 8 further bits, which detects
// every single flipped bit.
//
// One store of 8 bytes writes a whole word. The word 0 is the sealed 0, as in a new file.
#ifndef KIMI_BASE_SEALED_H_
#define KIMI_BASE_SEALED_H_

#include <cstdint>
#include <optional>

namespace kimi {

constexpr uint64_t kSealedBits = 56;

constexpr uint64_t XorOfBytes(uint64_t word) {
  word ^= word >> 32;
  word ^= word >> 16;
  return (word ^ (word >> 8)) & 0xff;
}

// REQUIRES: value < 2^56.
constexpr uint64_t Seal(uint64_t value) { return value | XorOfBytes(value) << kSealedBits; }

// The value, or nothing if the word is damaged.
constexpr std::optional<uint64_t> Unseal(uint64_t word) {
  if (XorOfBytes(word) != 0) return std::nullopt;
  return word & ((uint64_t{1} << kSealedBits) - 1);
}

}  // namespace kimi

#endif  // KIMI_BASE_SEALED_H_
