#include "weights/cast.h"

#include <bit>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kimi::weights {
namespace {

// Without a branch, which the compiler turns into vector instructions.
inline uint16_t OneToBFloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

#if defined(__x86_64__)
bool HasVectors() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
}

__attribute__((target("avx2"))) void ToBFloat16ByVectors(const float* from, uint16_t* to,
                                                         size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = OneToBFloat16(from[i]);
}

// Returns how many were converted.
__attribute__((target("avx2,f16c"))) size_t ToFloat16ByVectors(const float* from, uint16_t* to,
                                                               size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}
#endif

}  // namespace

uint16_t ToFloat16ByBits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((size >> 13) & 0x3ff));
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more.
  if (size < 0x38800000) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the last bits, rounded by the
    // CPU.
    const float sum = std::bit_cast<float>(size) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000));
  }
  const uint32_t rounded = size - 0x38000000 + 0xfff + ((size >> 13) & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

void ToBFloat16(const float* from, uint16_t* to, size_t n) {
#if defined(__x86_64__)
  if (HasVectors()) return ToBFloat16ByVectors(from, to, n);
#endif
  for (size_t i = 0; i < n; ++i) to[i] = OneToBFloat16(from[i]);
}

void ToFloat16(const float* from, uint16_t* to, size_t n) {
  size_t i = 0;
#if defined(__x86_64__)
  if (HasVectors()) i = ToFloat16ByVectors(from, to, n);
#endif
  for (; i < n; ++i) to[i] = ToFloat16ByBits(from[i]);
}

}  // namespace kimi::weights
