// The pass over the weights that publishing is: cast, checksum and copy, and its counterpart that
// only checks.
//
// Synchronisation: the caller's; the bytes written must be nobody else's until the call returns. It
// works in the calling thread and `threads - 1` more.
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

// A matrix that becomes the bytes of a slot from `offset` on, row by row.
struct Source {
  const void* data;
  DType from, to;
  uint64_t rows, columns;
  uint64_t stride;  // Elements from one row to the next.
  uint64_t offset;

  uint64_t Bytes() const { return rows * columns * SizeOf(to); }
};

// Writes every source to its place in `slot` and returns the CRC32C of each region. The data is
// read once, and what is written does not go through the caches.
//
// REQUIRES: sources and regions ascend, sources are of `from` == `to` or from kFloat32, and each
// region is the bytes of the sources in it, with no gap.
std::vector<uint32_t> CopyAndSum(std::span<const Source> sources, std::span<const Region> regions,
                                 std::byte* slot, unsigned threads);

// The CRC32C of each region of `slot`.
std::vector<uint32_t> Sum(std::span<const Region> regions, const std::byte* slot, unsigned threads);

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_COPY_H_
