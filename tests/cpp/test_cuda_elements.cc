#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/elements.h"

namespace kimi {
namespace {

float FromBFloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float FromHalf(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction != 0 ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

// All 65,536 values of the narrow type come back; half-way between two neighbours the even one is
// taken, and a hair to either side of it the nearer one.
template <typename Decode, typename Encode>
void TestRounding(Decode decode, Encode encode, uint16_t infinity) {
  int wrong = 0;
  for (uint32_t i = 0; i <= 0xffff; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const float value = decode(bits);
    if (std::isnan(value)) {
      wrong += !std::isnan(decode(encode(value)));
    } else {
      wrong += encode(value) != bits;
    }
  }
  CHECK_EQ(wrong, 0);
  for (uint16_t bits = 0; bits + 1 < infinity; ++bits) {
    const auto next = static_cast<uint16_t>(bits + 1);
    const auto even = static_cast<uint16_t>(bits + (bits & 1));
    const float middle = decode(bits) + (decode(next) - decode(bits)) / 2;
    wrong += encode(middle) != even || encode(-middle) != (even | 0x8000);
    wrong += encode(std::nextafter(middle, 0.0f)) != bits;
    wrong += encode(std::nextafter(middle, INFINITY)) != next;
  }
  CHECK_EQ(wrong, 0);
  CHECK_EQ(encode(std::numeric_limits<float>::max()), infinity);
}

void TestNanKeepsItsSign() {
  CHECK_EQ(BFloat16Bits(std::nanf("")) & 0x8000, 0);
  const uint32_t full = 0xffffffffu;  // Rounded like a number, this would become 0.
  float nan;
  std::memcpy(&nan, &full, sizeof nan);
  CHECK_EQ(BFloat16Bits(nan), 0xffff);
  CHECK_EQ(HalfBits(nan), 0xfe00);
}

// Sequences of every awkward length, their pages dealt out in random order.
void TestGather() {
  const int64_t per_page = 8;
  const std::vector<int32_t> lengths = {3, 0, 8, 9, 0, 0, 24, 1};
  const int64_t blocks = 3, page_bytes = 9 * per_page + 56;  // Room between pages.
  Pages pages{nullptr, page_bytes, per_page, 0, 4 * per_page, 8 * per_page};
  std::mt19937 random(3);
  std::vector<int32_t> cu_seqlens = {0}, table(lengths.size() * blocks), order(table.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<unsigned char> memory(order.size() * static_cast<size_t>(page_bytes), 0xee);
  std::vector<int32_t> ids;
  for (size_t sequence = 0; sequence < lengths.size(); ++sequence) {
    cu_seqlens.push_back(cu_seqlens.back() + lengths[sequence]);
    for (int64_t position = 0; position < lengths[sequence]; ++position) {
      const size_t block = sequence * blocks + static_cast<size_t>(position / per_page);
      table[block] = order[block];
      unsigned char* page = memory.data() + table[block] * page_bytes;
      const int64_t slot = position % per_page;
      ids.push_back(static_cast<int32_t>(random()));
      const float logprob = static_cast<float>(ids.size()) / 2;
      std::memcpy(page + 4 * slot, &ids.back(), 4);
      std::memcpy(page + pages.logprobs_offset + 4 * slot, &logprob, 4);
      page[pages.mask_offset + slot] = static_cast<unsigned char>(ids.size() % 2);
    }
  }
  pages.base = memory.data();
  const Packing packing{cu_seqlens.data(), static_cast<int32_t>(lengths.size()), table.data(),
                        blocks};
  std::vector<int32_t> got_ids(ids.size());
  std::vector<float> got_logprobs(ids.size());
  std::vector<uint8_t> got_mask(ids.size());
  for (int32_t token = 0; token < cu_seqlens.back(); ++token) {
    GatherToken(pages, packing, token, {got_ids.data(), got_logprobs.data(), got_mask.data()});
  }
  CHECK(got_ids == ids);
  for (size_t i = 0; i < ids.size(); ++i) {
    CHECK_EQ(got_logprobs[i], static_cast<float>(i + 1) / 2);
    CHECK_EQ(static_cast<int>(got_mask[i]), static_cast<int>((i + 1) % 2));
  }
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestRounding(kimi::FromBFloat16, kimi::BFloat16Bits, 0x7f80);
  kimi::TestRounding(kimi::FromHalf, kimi::HalfBits, 0x7c00);
  kimi::TestNanKeepsItsSign();
  kimi::TestGather();
  return kimi::test::Failures();
}
