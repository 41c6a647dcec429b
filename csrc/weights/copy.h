// The pass over the weights that publishes them (cast, checksum and copy), and one that only
// checks.
//
// Synchronisation: by the caller. No other thread may use the written bytes until the call returns.
// The work runs in the calling thread and in `threads - 1` others.
#ifndef KIMI_WEIGHTS_COPY_H_
#define KIMI_WEIGHTS_COPY_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "weights/cast.h"
#include "weights/format.h"

namespace kimi::weights {

// A matrix whose rows, one after another, become the bytes of a slot from `offset` on.
struct Source {
  const void* data;
  DType from, to;
  uint64_t rows, columns;
  uint64_t stride;  // Elements from one row to the next.
  uint64_t offset;

  uint64_t Bytes() const { return rows * columns * SizeOf(to); }
};

// Writes every source to its offset in `slot` and returns the CRC32C of each region. It reads the
// data once, and its stores bypass the caches.
//
// REQUIRES: sources and regions ascend; each source has `from` == `to` or `from` == kFloat32; the
// sources in a region fill it without a gap.
std::vector<uint32_t> CopyAndSum(std::span<const Source> sources, std::span<const Region> regions,
                                 std::byte* slot, unsigned threads);

// The CRC32C of each region of `slot`.
std::vector<uint32_t> Sum(std::span<const Region> regions, const std::byte* slot, unsigned threads);

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_COPY_H_
