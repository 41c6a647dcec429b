// The dtypes of weights, and casts between them.
#ifndef KIMI_WEIGHTS_CAST_H_
#define KIMI_WEIGHTS_CAST_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace kimi::weights {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Round to nearest, ties to even, as torch does. Too large becomes infinite; NaN stays NaN.
void ToBFloat16(const float* from, uint16_t* to, size_t n);
void ToFloat16(const float* from, uint16_t* to, size_t n);

// Cast one element without vector instructions. Public for the tests, which compare the two.
uint16_t ToBFloat16ByBits(float value);
uint16_t ToFloat16ByBits(float value);

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_CAST_H_
