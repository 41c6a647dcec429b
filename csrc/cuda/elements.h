// What the device code does with one element. Compiled by nvcc it runs on both sides; compiled by
// any other compiler it is plain C++, which is how it is tested where there is no GPU.
#ifndef KIMI_CUDA_ELEMENTS_H_
#define KIMI_CUDA_ELEMENTS_H_

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KIMI_HOST_DEVICE __host__ __device__
#else
#define KIMI_HOST_DEVICE
#endif

namespace kimi {

KIMI_HOST_DEVICE inline uint32_t BitsOf(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The nearest bfloat16, ties to even; NaN stays NaN, with its sign and the top of its payload.
KIMI_HOST_DEVICE inline uint16_t BFloat16Bits(float value) {
  const uint32_t bits = BitsOf(value);
  // Rounding could carry a NaN's payload into its sign.
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The nearest IEEE half, ties to even; what is too large becomes infinite, NaN stays NaN.
KIMI_HOST_DEVICE inline uint16_t HalfBits(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= BitsOf(65536.0f)) {
    return static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
  }
  if (magnitude < BitsOf(6.103515625e-5f)) {  // 2^-14: below it a half is a multiple of 2^-24.
    float absolute;
    memcpy(&absolute, &magnitude, sizeof absolute);
    // One half has that last place, so the addition rounds and leaves the multiple in the low bits.
    return static_cast<uint16_t>(sign | (BitsOf(absolute + 0.5f) - BitsOf(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));  // Bias 127 to 15.
}

// Pages of tokens in columns, one page after the other.
struct Pages {
  const unsigned char* base;
  int64_t page_bytes;
  int64_t tokens_per_page;
  // Where each column begins within a page, in bytes.
  int64_t ids_offset;
  int64_t logprobs_offset;
  int64_t mask_offset;
};

// Sequences to lay end to end: sequence i has packed tokens [cu_seqlens[i], cu_seqlens[i + 1]), and
// its k-th page is page block_table[i * blocks_per_sequence + k].
struct Packing {
  const int32_t* cu_seqlens;  // [sequences + 1], from 0, not falling.
  int32_t sequences;
  const int32_t* block_table;
  int64_t blocks_per_sequence;
};

struct PackedColumns {
  int32_t* ids;
  float* logprobs;
  uint8_t* mask;
};

// The sequence that a packed token belongs to. REQUIRES: 0 <= token < cu_seqlens[sequences].
KIMI_HOST_DEVICE inline int32_t SequenceOf(const Packing& packing, int32_t token) {
  int32_t low = 0, high = packing.sequences;  // cu_seqlens[low] <= token < cu_seqlens[high].
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (packing.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Copies one packed token out of its page. REQUIRES: as above; the columns are aligned.
KIMI_HOST_DEVICE inline void GatherToken(const Pages& pages, const Packing& packing, int32_t token,
                                         const PackedColumns& out) {
  const int32_t sequence = SequenceOf(packing, token);
  const int64_t position = token - packing.cu_seqlens[sequence];
  const int64_t block = sequence * packing.blocks_per_sequence + position / pages.tokens_per_page;
  const int64_t slot = position % pages.tokens_per_page;
  const unsigned char* page = pages.base + packing.block_table[block] * pages.page_bytes;
  out.ids[token] = reinterpret_cast<const int32_t*>(page + pages.ids_offset)[slot];
  out.logprobs[token] = reinterpret_cast<const float*>(page + pages.logprobs_offset)[slot];
  out.mask[token] = (page + pages.mask_offset)[slot];
}

}  // namespace kimi

#endif  // KIMI_CUDA_ELEMENTS_H_
