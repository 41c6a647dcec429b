// CRC32C (Castagnoli), the checksum of iSCSI and ext4: the CPU has an instruction for it.
//
// The instruction is used where the CPU has it (SSE4.2 or ARMv8 CRC), a table elsewhere; the choice
// is made once, at run time. Both give the same values.
//
// Synchronisation: none needed; these are pure functions.
#ifndef KIMI_BASE_CRC32C_H_
#define KIMI_BASE_CRC32C_H_

#include <cstddef>
#include <cstdint>

namespace kimi::crc32c {

// The checksum of what `crc` is the checksum of, followed by `size` bytes at `data`. Begin with 0.
uint32_t Extend(uint32_t crc, const void* data, size_t size);

// Extend for two checksums at once, of `size` bytes each. The instruction has a latency of three
// cycles and starts every cycle, so that two chains side by side take the time of one.
void ExtendTwo(uint32_t* crc_a, const void* a, uint32_t* crc_b, const void* b, size_t size);

// The checksum of bytes that `crc_a` is the checksum of, followed by `size_b` that `crc_b` is of.
uint32_t Join(uint32_t crc_a, uint32_t crc_b, uint64_t size_b);

// Extend without the CPU's instruction. Public so that the tests can compare the two.
uint32_t ExtendByTable(uint32_t crc, const void* data, size_t size);

// Whether Extend uses the CPU's instruction.
bool HasInstruction();

}  // namespace kimi::crc32c

#endif  // KIMI_BASE_CRC32C_H_
