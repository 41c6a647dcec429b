// Device code of the core: thin loops around elements.h. All pointers are device pointers; the
// calls only enqueue work on `stream` (a cudaStream_t; null is the default stream), so that what
// they read and write must stay until the stream has passed them.
//
// Throws std::runtime_error, with what CUDA says, if a launch fails. Compiled in the tests; not yet
// run on a GPU.
#ifndef KIMI_CUDA_LAUNCH_H_
#define KIMI_CUDA_LAUNCH_H_

#include <cstdint>

#include "cuda/elements.h"

namespace kimi::cuda {

// Gathers the pages of a buffer into a packed batch of `tokens` tokens.
//
// REQUIRES: tokens == packing.cu_seqlens[packing.sequences].
void GatherPages(const Pages& pages, const Packing& packing, int32_t tokens,
                 const PackedColumns& out, void* stream);

// Casts `count` weights while copying them. REQUIRES: `from` and `to` do not overlap.
void CastToBFloat16(const float* from, uint16_t* to, int64_t count, void* stream);
void CastToHalf(const float* from, uint16_t* to, int64_t count, void* stream);

}  // namespace kimi::cuda

#endif  // KIMI_CUDA_LAUNCH_H_
