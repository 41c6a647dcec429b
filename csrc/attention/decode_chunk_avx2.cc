#define KIMI_VECTOR_BYTES 32
#include "attention/decode_chunk_inl.h"

namespace kimi {

ChunkPasses Avx2ChunkPasses() { return {&PassChunk<float>, &PassChunk<Bfloat16>}; }

}  // namespace kimi
