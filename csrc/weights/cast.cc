#include "weights/cast.h"

#include <bit>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kimi::weights {
namespace {

#if defined(__x86_64__)
bool HasVectors() {
  // Every processor with AVX2 has F16C, a name that clang knows from version 15 on only.
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}

#define KIMI_AVX2 __attribute__((target("avx2")))

KIMI_AVX2 __m256i EightToBFloat16(const float* from) {
  const __m256 values = _mm256_loadu_ps(from);
  const __m256i bits = _mm256_castps_si256(values), high = _mm256_srli_epi32(bits, 16);
  const __m256i last = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i carry = _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, carry), 16);
  const __m256i quiet_nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, quiet_nan, _mm256_castps_si256(is_nan));
}

// Returns the number of elements that were converted.
KIMI_AVX2 size_t ToBFloat16ByVectors(const float* from, uint16_t* to, size_t n) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    // Packing works on each half of a register, so the quarters need reordering.
    const __m256i packed =
        _mm256_packus_epi32(EightToBFloat16(from + i), EightToBFloat16(from + i + 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_permute4x64_epi64(packed, 0b11'01'10'00));
  }
  return i;
}

#define KIMI_F16C __attribute__((target("avx2,f16c")))

KIMI_F16C size_t ToFloat16ByVectors(const float* from, uint16_t* to, size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}
#endif

}  // namespace

uint16_t ToBFloat16ByBits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t ToFloat16ByBits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((size >> 13) & 0x3ff));
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // From 65520 on.
  if (size < 0x38800000) {
    // A subnormal result: adding 0.5 leaves it in the low bits, rounded, in units of 2^-24.
    const float sum = std::bit_cast<float>(size) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000));
  }
  const uint32_t rounded = size - 0x38000000 + 0xfff + ((size >> 13) & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

void ToBFloat16(const float* from, uint16_t* to, size_t n) {
  size_t i = 0;
#if defined(__x86_64__)
  if (HasVectors()) i = ToBFloat16ByVectors(from, to, n);
#endif
  for (; i < n; ++i) to[i] = ToBFloat16ByBits(from[i]);
}

void ToFloat16(const float* from, uint16_t* to, size_t n) {
  size_t i = 0;
#if defined(__x86_64__)
  if (HasVectors()) i = ToFloat16ByVectors(from, to, n);
#endif
  for (; i < n; ++i) to[i] = ToFloat16ByBits(from[i]);
}

}  // namespace kimi::weights
