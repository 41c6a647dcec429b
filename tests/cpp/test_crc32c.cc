#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "base/crc32c.h"
#include "check.h"

namespace kimi {
namespace {

uint32_t Bitwise(const std::vector<unsigned char>& data, size_t offset, size_t size) {
  uint32_t crc = ~uint32_t{0};
  for (size_t i = offset; i < offset + size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78 : 0);
  }
  return ~crc;
}

void TestPublishedValues() {
  const std::string digits = "123456789";
  CHECK_EQ(crc32c::Extend(0, digits.data(), digits.size()), 0xe3069283u);
  const std::vector<unsigned char> zeros(32, 0), ones(32, 0xff);  // RFC 3720, B.4.
  CHECK_EQ(crc32c::Extend(0, zeros.data(), 32), 0x8a9136aau);
  CHECK_EQ(crc32c::Extend(0, ones.data(), 32), 0x62a8ab43u);
}

void TestInstructionTableAndDefinitionAgree() {
  std::mt19937 random(1);
  std::vector<unsigned char> data(600);
  for (auto& byte : data) byte = static_cast<unsigned char>(random());
  for (size_t size = 0; size < 70; ++size) {  // Every remainder of 8, at every alignment.
    for (size_t offset = 0; offset < 9; ++offset) {
      const uint32_t expected = Bitwise(data, offset, size);
      CHECK_EQ(crc32c::Extend(0, data.data() + offset, size), expected);
      CHECK_EQ(crc32c::ExtendByTable(0, data.data() + offset, size), expected);
      uint32_t one = 0, other = 5;
      crc32c::ExtendTwo(&one, data.data() + offset, &other, data.data() + 100, size);
      CHECK_EQ(one, expected);
      CHECK_EQ(other, crc32c::ExtendByTable(5, data.data() + 100, size));
    }
  }
}

void TestPartsGiveTheWhole() {
  const std::vector<unsigned char> data(100, 7);
  const uint32_t whole = crc32c::Extend(0, data.data(), 100);
  for (size_t cut = 0; cut <= 100; ++cut) {
    const uint32_t first = crc32c::Extend(0, data.data(), cut);
    CHECK_EQ(crc32c::ExtendByTable(first, data.data() + cut, 100 - cut), whole);
  }
}

// Long enough for three stripes at a time, with remainders of every kind.
void TestLongOnesAgreeWithTheTable() {
  std::mt19937 random(2);
  std::vector<unsigned char> data(20'000);
  for (auto& byte : data) byte = static_cast<unsigned char>(random());
  for (const size_t size : {6143, 6144, 6145, 12287, 12288, 12299, 20'000}) {
    CHECK_EQ(crc32c::Extend(3, data.data(), size), crc32c::ExtendByTable(3, data.data(), size));
  }
}

void TestJoinedPartsGiveTheWhole() {
  std::mt19937 random(3);
  std::vector<unsigned char> data(9000);
  for (auto& byte : data) byte = static_cast<unsigned char>(random());
  const uint32_t whole = crc32c::Extend(0, data.data(), data.size());
  for (const size_t cut : {0, 1, 7, 64, 4095, 8999, 9000}) {
    const uint32_t first = crc32c::Extend(0, data.data(), cut);
    const uint32_t second = crc32c::Extend(0, data.data() + cut, data.size() - cut);
    CHECK_EQ(crc32c::Join(first, second, data.size() - cut), whole);
  }
}

}  // namespace
}  // namespace kimi

int main() {
  std::cout << "instruction: " << kimi::crc32c::HasInstruction() << '\n';
  kimi::TestPublishedValues();
  kimi::TestInstructionTableAndDefinitionAgree();
  kimi::TestPartsGiveTheWhole();
  kimi::TestLongOnesAgreeWithTheTable();
  kimi::TestJoinedPartsGiveTheWhole();
  return kimi::test::Failures();
}
