// The passes over one row, one version for each instruction set; logprob_tile.cc chooses one.
#ifndef KIMI_LOSS_LOGPROB_ROWS_H_
#define KIMI_LOSS_LOGPROB_ROWS_H_

#include <cstdint>

#include "loss/logprob_tile.h"

namespace kimi {

struct RowStatistics {
  float top;
  double total;
  float picked;
  double weighted;
};

struct RowPasses {
  RowStatistics (*statistics)(const TileHead& head, const float* logits, int64_t target);
  void (*gradient)(const TileHead& head, float* logits, int64_t target, float top, double total,
                   float outer);
};

RowPasses PortableRowPasses();
#if defined(__x86_64__)
RowPasses Avx2RowPasses();
RowPasses Avx512RowPasses();
#endif

}  // namespace kimi

#endif  // KIMI_LOSS_LOGPROB_ROWS_H_
