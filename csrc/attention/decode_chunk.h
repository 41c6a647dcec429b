// The pass over one chunk of positions, one version for each instruction set; decode.cc chooses
// one.
#ifndef KIMI_ATTENTION_DECODE_CHUNK_H_
#define KIMI_ATTENTION_DECODE_CHUNK_H_

#include <cstdint>

#include "attention/decode.h"

namespace kimi {

// The result of a chunk for each query head of a group, before the division by `total`. Scores are
// plain products: the caller has scaled the query.
struct ChunkResult {
  float* top;    // [group]: the largest score.
  float* total;  // [group]: sum of exp(score - top).
  float* sums;   // [group, dim]: sum of exp(score - top) * value.
};

template <typename Stored>
using ChunkPass = void (*)(const float* query, const Stored* keys, const Stored* values,
                           int64_t positions, int64_t group, int64_t dim,
                           const ChunkResult& result);

struct ChunkPasses {
  ChunkPass<float> float32;
  ChunkPass<Bfloat16> bfloat16;
};

ChunkPasses PortableChunkPasses();
#if defined(__x86_64__)
ChunkPasses Avx2ChunkPasses();
ChunkPasses Avx512ChunkPasses();
#endif

}  // namespace kimi

#endif  // KIMI_ATTENTION_DECODE_CHUNK_H_
