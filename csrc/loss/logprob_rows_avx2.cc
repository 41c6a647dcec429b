#define KIMI_VECTOR_BYTES 32
#include "loss/logprob_rows_inl.h"

namespace kimi {

RowPasses Avx2RowPasses() { return {&Statistics, &Gradient}; }

}  // namespace kimi
