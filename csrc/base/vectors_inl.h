// Vectors of KIMI_VECTOR_BYTES and arithmetic on them. Each file that includes this header is
// compiled for another instruction set, so everything here has internal linkage. The linker could
// otherwise use an inline function compiled for AVX-512 in the portable passes. For the same reason
// headers like this use no inline function of the standard library.

#include <cstdint>
#include <cstring>

namespace kimi {
namespace {

using Floats = float __attribute__((vector_size(KIMI_VECTOR_BYTES)));
using Ints = int32_t __attribute__((vector_size(KIMI_VECTOR_BYTES)));
constexpr int kLanes = KIMI_VECTOR_BYTES / 4;
constexpr float kInfinity = __builtin_inff();

inline Floats Splat(float value) { return Floats{} + value; }

// exp(x) to about one unit in the last place, for x <= 0 or NaN; 0 if the result is below the
// normal numbers. exp(0) is exactly 1, so that a row with one certain token has a log-prob of 0.
inline Floats ExpOfNegative(Floats x) {
  const Floats magic = Splat(12582912.0f);  // 1.5 * 2^23; adding it rounds to the nearest integer.
  const Floats rounded = x * 1.44269504f + magic;
  const Floats n = rounded - magic;
  // ln 2 in two parts; the product of n and the first part is exact.
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = Splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n from its bits; n is in the low bits of the rounded sum.
  Ints bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return x < Splat(-87.0f) ? Floats{} : p * power;
}

}  // namespace
}  // namespace kimi
