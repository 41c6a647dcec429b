#include "base/crc32c.h"

#include <array>
#include <cstring>

#if defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace kimi::crc32c {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // With its bits reversed, as CRC32C requires.

// kTable[k][b] is the checksum of byte b followed by k zero bytes; 8 look-ups add 8 bytes at once.
constexpr std::array<std::array<uint32_t, 256>, 8> MakeTable() {
  std::array<std::array<uint32_t, 256>, 8> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    table[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = table[k - 1][byte];
      table[k][byte] = (crc >> 8) ^ table[0][crc & 0xff];
    }
  }
  return table;
}

constexpr auto kTable = MakeTable();

// ---- Checksums as polynomials over {0, 1}, with the lowest power in the highest bit. Appending n
// zero bytes multiplies a checksum by x^(8n), modulo the polynomial of CRC32C.

constexpr uint32_t kOne = uint32_t{1} << 31;

constexpr uint32_t Times(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t power = kOne; power != 0; power >>= 1) {
    if (a & power) product ^= b;
    b = (b >> 1) ^ ((b & 1) ? kPolynomial : 0);  // Times x.
  }
  return product;
}

constexpr uint32_t PowerOfBytes(uint64_t n) {  // x^(8n)
  uint32_t result = kOne;
  for (uint32_t square = kOne >> 8; n > 0; n >>= 1, square = Times(square, square)) {
    if (n & 1) result = Times(result, square);
  }
  return result;
}

// The instruction takes three cycles and can start every cycle, so three independent stripes keep
// it busy. kBehind[k][b] is the checksum whose byte k is b, extended by a stripe of zeros.
constexpr size_t kStripe = 2048;

constexpr std::array<std::array<uint32_t, 256>, 4> MakeBehind() {
  std::array<std::array<uint32_t, 256>, 4> table{};
  const uint32_t power = PowerOfBytes(kStripe);
  for (uint32_t k = 0; k < 4; ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) table[k][byte] = Times(byte << (8 * k), power);
  }
  return table;
}

constexpr auto kBehind = MakeBehind();

uint32_t WithStripeBehind(uint32_t crc) {
  return kBehind[0][crc & 0xff] ^ kBehind[1][(crc >> 8) & 0xff] ^ kBehind[2][(crc >> 16) & 0xff] ^
         kBehind[3][crc >> 24];
}

uint64_t LoadWord(const unsigned char* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

#if defined(__x86_64__)
#define KIMI_CRC_TARGET __attribute__((target("sse4.2")))
KIMI_CRC_TARGET uint32_t TakeWord(uint32_t crc, uint64_t word) {
  return static_cast<uint32_t>(__builtin_ia32_crc32di(crc, word));
}
KIMI_CRC_TARGET uint32_t TakeByte(uint32_t crc, unsigned char byte) {
  return __builtin_ia32_crc32qi(crc, byte);
}
bool CpuHasInstruction() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__)
#define KIMI_CRC_TARGET __attribute__((target("+crc")))
KIMI_CRC_TARGET uint32_t TakeWord(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
KIMI_CRC_TARGET uint32_t TakeByte(uint32_t crc, unsigned char byte) { return __crc32cb(crc, byte); }
bool CpuHasInstruction() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#endif

#if defined(KIMI_CRC_TARGET)
KIMI_CRC_TARGET uint32_t ExtendByInstruction(uint32_t crc, const void* bytes, size_t size) {
  auto data = static_cast<const unsigned char*>(bytes);
  crc = ~crc;
  for (; size >= 3 * kStripe; data += 3 * kStripe, size -= 3 * kStripe) {
    uint32_t second = 0, third = 0;
    for (size_t at = 0; at < kStripe; at += 8) {
      crc = TakeWord(crc, LoadWord(data + at));
      second = TakeWord(second, LoadWord(data + kStripe + at));
      third = TakeWord(third, LoadWord(data + 2 * kStripe + at));
    }
    crc = WithStripeBehind(WithStripeBehind(crc) ^ second) ^ third;
  }
  for (; size >= 8; data += 8, size -= 8) crc = TakeWord(crc, LoadWord(data));
  for (; size > 0; ++data, --size) crc = TakeByte(crc, *data);
  return ~crc;
}

KIMI_CRC_TARGET void ExtendTwoByInstruction(uint32_t* crc_a, const void* bytes_a, uint32_t* crc_b,
                                            const void* bytes_b, size_t size) {
  auto a = static_cast<const unsigned char*>(bytes_a);
  auto b = static_cast<const unsigned char*>(bytes_b);
  uint32_t sum_a = ~*crc_a, sum_b = ~*crc_b;
  for (; size >= 8; a += 8, b += 8, size -= 8) {
    sum_a = TakeWord(sum_a, LoadWord(a));
    sum_b = TakeWord(sum_b, LoadWord(b));
  }
  for (; size > 0; ++a, ++b, --size) {
    sum_a = TakeByte(sum_a, *a);
    sum_b = TakeByte(sum_b, *b);
  }
  *crc_a = ~sum_a;
  *crc_b = ~sum_b;
}
#else
bool CpuHasInstruction() { return false; }
constexpr auto* ExtendByInstruction = &ExtendByTable;
void ExtendTwoByInstruction(uint32_t*, const void*, uint32_t*, const void*, size_t) {}
#endif

}  // namespace

bool HasInstruction() {
  static const bool has = CpuHasInstruction();
  return has;
}

uint32_t Extend(uint32_t crc, const void* data, size_t size) {
  return HasInstruction() ? ExtendByInstruction(crc, data, size) : ExtendByTable(crc, data, size);
}

void ExtendTwo(uint32_t* crc_a, const void* a, uint32_t* crc_b, const void* b, size_t size) {
  if (HasInstruction()) {
    ExtendTwoByInstruction(crc_a, a, crc_b, b, size);
  } else {
    *crc_a = ExtendByTable(*crc_a, a, size);
    *crc_b = ExtendByTable(*crc_b, b, size);
  }
}

uint32_t Join(uint32_t crc_a, uint32_t crc_b, uint64_t size_b) {
  return Times(crc_a, PowerOfBytes(size_b)) ^ crc_b;
}

uint32_t ExtendByTable(uint32_t crc, const void* bytes, size_t size) {
  auto data = static_cast<const unsigned char*>(bytes);
  crc = ~crc;
  for (; size >= 8; data += 8, size -= 8) {
    const uint64_t word = LoadWord(data) ^ crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= kTable[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ kTable[0][(crc ^ *data) & 0xff];
  return ~crc;
}

}  // namespace kimi::crc32c
