// CRC32C (Castagnoli), the checksum of iSCSI and ext4.
//
// The CPU's instruction is used if it has one (SSE4.2 or ARMv8 CRC), otherwise a table. The choice
// is made once, at run time. Both give the same values.
//
// Synchronisation: none needed; these are pure functions.
#ifndef KIMI_BASE_CRC32C_H_
#define KIMI_BASE_CRC32C_H_

#include <cstddef>
#include <cstdint>

namespace kimi::crc32c {

// Extends `crc`, the checksum of earlier bytes, by the `size` bytes at `data`. Start with 0.
uint32_t Extend(uint32_t crc, const void* data, size_t size);

// Extends two checksums at once, each by `size` bytes. The instruction takes three cycles and can
// start every cycle, so two independent chains take the time of one.
void ExtendTwo(uint32_t* crc_a, const void* a, uint32_t* crc_b, const void* b, size_t size);

// The checksum of bytes with checksum `crc_a` and then `size_b` bytes with checksum `crc_b`.
uint32_t Join(uint32_t crc_a, uint32_t crc_b, uint64_t size_b);

// Extend without the CPU's instruction. Public for the tests, which compare the two.
uint32_t ExtendByTable(uint32_t crc, const void* data, size_t size);

// Whether Extend uses the CPU's instruction.
bool HasInstruction();

}  // namespace kimi::crc32c

#endif  // KIMI_BASE_CRC32C_H_
