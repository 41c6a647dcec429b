// The casts compared with a definition in double precision, and the single pass compared with
// separate casts, copies and checksums.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/crc32c.h"
#include "check.h"
#include "weights/cast.h"
#include "weights/copy.h"

namespace kimi::weights {
namespace {

double ValueOfBFloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

double ValueOfFloat16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 0x3ff;
  const double size = exponent == 0    ? std::ldexp(fraction, -24)
                      : exponent == 31 ? std::numeric_limits<double>::infinity()
                                       : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// The nearest of all finite values, or on a tie the one whose last bit is 0. A number that is
// nearer to the value after the last one than to the last one becomes infinite.
template <typename Value>
uint16_t Nearest(float given, uint16_t infinity, const Value& value_of) {
  const double size = std::fabs(double{given});
  const auto sign = static_cast<uint16_t>(std::signbit(given) ? 0x8000 : 0);
  uint16_t low = 0, high = infinity;  // The values of these bits never decrease.
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (value_of(middle) <= size ? low : high) = middle;
  }
  if (size > std::numeric_limits<float>::max()) return sign | infinity;
  const double below = value_of(low);
  // The value that would follow the greatest finite one.
  const double above = high == infinity ? below + (below - value_of(static_cast<uint16_t>(low - 1)))
                                        : value_of(high);
  const bool up = size - below > above - size || (size - below == above - size && low % 2 == 1);
  return sign | (up ? high : low);
}

std::vector<float> Numbers() {
  std::mt19937 random(1);
  std::vector<float> numbers;
  for (int i = 0; i < 30'000; ++i) {
    numbers.push_back(std::bit_cast<float>(static_cast<uint32_t>(random())));
  }
  for (int i = 0; i < 30'000; ++i) {  // In the range of float16, with ties and subnormals.
    const auto exponent = 100 + random() % 45, fraction = random() % 4096 << 11;
    const uint32_t bits = static_cast<uint32_t>(random() % 2) << 31 |
                          static_cast<uint32_t>(exponent) << 23 | static_cast<uint32_t>(fraction);
    numbers.push_back(std::bit_cast<float>(bits));
  }
  for (const float size : {0.0f, 65504.0f, 65519.99f, 65520.0f, 6.1e-5f, 5.96e-8f, 2.98e-8f,
                           3.4e38f, std::numeric_limits<float>::infinity()}) {
    numbers.insert(numbers.end(), {size, -size});
  }
  return numbers;
}

void TestCastsRoundToTheNearest() {
  const std::vector<float> numbers = Numbers();
  std::vector<uint16_t> brains(numbers.size()), halves(numbers.size());
  ToBFloat16(numbers.data(), brains.data(), numbers.size());
  ToFloat16(numbers.data(), halves.data(), numbers.size());
  uint64_t wrong = 0;
  for (size_t i = 0; i < numbers.size(); ++i) {
    const float number = numbers[i];
    if (std::isnan(number)) {
      wrong += !std::isnan(ValueOfBFloat16(brains[i])) ||
               !std::isnan(ValueOfBFloat16(ToBFloat16ByBits(number)));
      wrong += (halves[i] & 0x7fff) <= 0x7c00 || (ToFloat16ByBits(number) & 0x7fff) <= 0x7c00;
      continue;
    }
    const uint16_t brain = Nearest(number, 0x7f80, ValueOfBFloat16);
    const uint16_t half = Nearest(number, 0x7c00, ValueOfFloat16);
    wrong += brains[i] != brain || ToBFloat16ByBits(number) != brain;
    wrong += halves[i] != half || ToFloat16ByBits(number) != half;
  }
  CHECK_EQ(wrong, 0u);
}

// Two regions with a gap between them. The second one has a block of columns of a matrix, then a
// long vector, so that pieces of both kinds are joined.
void TestOnePassIsCopyAndChecksum() {
  constexpr uint64_t kRows = 301, kColumns = 1000, kTaken = 77, kLong = 2'200'001;
  std::mt19937 random(4);
  std::vector<float> matrix(kRows * kColumns), vector(kLong);
  for (float& value : matrix) value = static_cast<float>(random()) / 1e9f - 2;
  for (float& value : vector) value = static_cast<float>(random()) / 1e9f - 2;
  for (const DType to : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const uint64_t width = SizeOf(to), second = 32, taken = kRows * kTaken * width;
    const std::vector<Source> sources = {
        {vector.data(), DType::kFloat32, to, 1, 5, 5, 0},
        {matrix.data() + 9, DType::kFloat32, to, kRows, kTaken, kColumns, second},
        {vector.data(), DType::kFloat32, to, 1, kLong, kLong, second + taken}};
    const std::vector<Region> regions = {{0, 5 * width}, {second, taken + kLong * width}};

    std::vector<float> floats(vector.begin(), vector.begin() + 5);
    floats.resize(second / width);
    for (uint64_t row = 0; row < kRows; ++row) {
      const auto from = matrix.begin() + static_cast<std::ptrdiff_t>(row * kColumns + 9);
      floats.insert(floats.end(), from, from + kTaken);
    }
    floats.insert(floats.end(), vector.begin(), vector.end());
    std::vector<std::byte> expected(floats.size() * width);
    auto* halves = reinterpret_cast<uint16_t*>(expected.data());
    if (to == DType::kFloat32) std::memcpy(expected.data(), floats.data(), expected.size());
    if (to == DType::kBFloat16) ToBFloat16(floats.data(), halves, floats.size());
    if (to == DType::kFloat16) ToFloat16(floats.data(), halves, floats.size());

    for (const unsigned threads : {1u, 3u}) {
      std::vector<std::byte> slot(expected.size());
      const auto crcs = CopyAndSum(sources, regions, slot.data(), threads);
      CHECK(slot == expected);
      for (size_t i = 0; i < regions.size(); ++i) {
        CHECK_EQ(crcs[i], crc32c::Extend(0, expected.data() + regions[i].offset, regions[i].bytes));
      }
      CHECK(Sum(regions, slot.data(), threads) == crcs);
    }
  }
}

void TestEmptyRegionsHaveTheChecksumOfNothing() {
  std::byte slot[8] = {};
  const float values[2] = {1, 2};
  const std::vector<Region> regions = {{0, 0}, {0, 8}, {8, 0}};
  const std::vector<Source> sources = {
      {values, DType::kFloat32, DType::kFloat32, 0, 2, 2, 0},
      {values, DType::kFloat32, DType::kFloat32, 1, 2, 2, 0},
      {values, DType::kFloat32, DType::kFloat32, 0, 2, 2, 8},
  };
  const auto crcs = CopyAndSum(sources, regions, slot, 2);
  CHECK((crcs == std::vector<uint32_t>{0, crc32c::Extend(0, values, 8), 0}));
  CHECK(Sum(regions, slot, 2) == crcs);
}

}  // namespace
}  // namespace kimi::weights

int main() {
  kimi::weights::TestCastsRoundToTheNearest();
  kimi::weights::TestOnePassIsCopyAndChecksum();
  kimi::weights::TestEmptyRegionsHaveTheChecksumOfNothing();
  return kimi::test::Failures();
}
