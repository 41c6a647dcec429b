// Gathers pages of a buffer into packed columns, on a GPU.
//
// GatherToken has the arithmetic. It compiles for GPU and host, so the tests run it without a GPU.
#ifndef KIMI_CUDA_GATHER_H_
#define KIMI_CUDA_GATHER_H_

#include <cstdint>

#if defined(__CUDACC__)
#define KIMI_HOST_DEVICE __host__ __device__
#else
#define KIMI_HOST_DEVICE
#endif

namespace kimi::cuda {

// The pages of several sequences. The pages of one sequence follow each other, and each page has
// the three columns of buffer/format.h: int32 ids, float32 log-probs, uint8 mask.
struct PagedSequences {
  const unsigned char* pages;
  int64_t page_tokens;         // A multiple of 8, which keeps the columns aligned.
  const int32_t* first_pages;  // [sequences]; the page where a sequence begins.
  const int32_t* cu_seqlens;   // [sequences + 1]; starts at 0 and never falls.
  int32_t sequences;
};

// Columns of packed tokens, each [cu_seqlens[sequences]].
struct PackedColumns {
  int32_t* ids;
  float* logprobs;
  uint8_t* mask;
};

// Returns the sequence of a packed token. REQUIRES: 0 <= token < cu_seqlens[sequences].
KIMI_HOST_DEVICE inline int32_t SequenceOf(const PagedSequences& from, int32_t token) {
  int32_t low = 0, high = from.sequences;  // cu_seqlens[low] <= token < cu_seqlens[high].
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (from.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Copies one packed token from its page. REQUIRES: as SequenceOf.
KIMI_HOST_DEVICE inline void GatherToken(const PagedSequences& from, int32_t token,
                                         const PackedColumns& to) {
  const int32_t sequence = SequenceOf(from, token);
  const int64_t position = token - from.cu_seqlens[sequence], tokens = from.page_tokens;
  const int64_t number = from.first_pages[sequence] + position / tokens;
  const int64_t at = position % tokens;
  const unsigned char* page = from.pages + number * 9 * tokens;
  to.ids[token] = reinterpret_cast<const int32_t*>(page)[at];
  to.logprobs[token] = reinterpret_cast<const float*>(page + 4 * tokens)[at];
  to.mask[token] = page[8 * tokens + at];
}

// Gathers `tokens` tokens on the GPU. The call only enqueues work on `stream` (a cudaStream_t; null
// is the default stream). Throws std::runtime_error with CUDA's message if the launch fails.
//
// REQUIRES: all pointers are device pointers that stay valid until the work ends;
// tokens == cu_seqlens[sequences]; the stream's device is current.
void Gather(const PagedSequences& from, int32_t tokens, const PackedColumns& to, void* stream);

}  // namespace kimi::cuda

#endif  // KIMI_CUDA_GATHER_H_
