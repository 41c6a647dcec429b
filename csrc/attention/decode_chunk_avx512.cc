#define KIMI_VECTOR_BYTES 64
#include "attention/decode_chunk_inl.h"

namespace kimi {

ChunkPasses Avx512ChunkPasses() { return {&PassChunk<float>, &PassChunk<Bfloat16>}; }

}  // namespace kimi
