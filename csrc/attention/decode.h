// Attention of one query per row over stored keys and values, as decoding needs it: softmax(q k) v.
//
// The pass is bound by reading keys and values, and it reads each of them once, up to the row's own
// length. Query heads that share keys are computed together. A long row is cut into chunks of a
// fixed length, whose results are merged in order, so the result does not depend on the number of
// threads or on the other rows.
//
// Synchronisation: none needed; calls with different outputs may run at the same time.
#ifndef KIMI_ATTENTION_DECODE_H_
#define KIMI_ATTENTION_DECODE_H_

#include <cstdint>

#include "base/instruction_set.h"

namespace kimi {

// A number of 16 bits: the upper half of a float.
struct Bfloat16 {
  uint16_t bits;
};

// Keys or values: [rows, kv_heads, positions, dim]. The numbers of one position lie side by side,
// and so do the positions of one head.
template <typename Stored>
struct Cached {
  const Stored* data;
  int64_t row_stride;   // Numbers between rows.
  int64_t head_stride;  // Numbers between heads.
};

struct DecodeShape {
  int64_t rows;
  int64_t kv_heads;
  int64_t group;  // Query heads that share keys.
  int64_t dim;
  int64_t window;  // Positions that a query sees, the last ones; 0: all.
  float scale;     // Factor on q k.
};

// Fills `out`, [rows, kv_heads * group, dim], from `query` of the same shape.
//
// REQUIRES: all sizes > 0, window >= 0, threads > 0; every one of `lengths`, [rows], is at least 1
// and at most the positions that are stored; `set` is available.
template <typename Stored>
void DecodeAttention(const DecodeShape& shape, const float* query, const Cached<Stored>& keys,
                     const Cached<Stored>& values, const int64_t* lengths, float* out, int threads,
                     InstructionSet set);

}  // namespace kimi

#endif  // KIMI_ATTENTION_DECODE_H_
