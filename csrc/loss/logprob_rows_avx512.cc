#define KIMI_VECTOR_BYTES 64
#include "loss/logprob_rows_inl.h"

namespace kimi {

RowPasses Avx512RowPasses() { return {&Statistics, &Gradient}; }

}  // namespace kimi
