#define KIMI_VECTOR_BYTES 16
#include "attention/decode_chunk_inl.h"

namespace kimi {

ChunkPasses PortableChunkPasses() { return {&PassChunk<float>, &PassChunk<Bfloat16>}; }

}  // namespace kimi
