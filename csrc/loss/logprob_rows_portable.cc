#define KIMI_VECTOR_BYTES 16
#include "loss/logprob_rows_inl.h"

namespace kimi {

RowPasses PortableRowPasses() { return {&Statistics, &Gradient}; }

}  // namespace kimi
