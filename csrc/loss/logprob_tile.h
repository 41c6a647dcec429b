// Passes over a tile of logits: the softmax statistics of each row, and the gradient of the row's
// log-prob in place. The caller computes the matrix products before and after them.
//
// The scores of a row are s = logits + bias, capped to softcap * tanh(s / softcap) if there is a
// cap. Tokens are distributed as softmax(s / temperature). All numbers are relative to the row's
// largest score, so no shift of the logits overflows or loses digits. Sums over the vocabulary end
// in double, so that sums over thousands of rows do not drift (docs/numerics.md).
//
// Synchronisation: none needed; calls on different tiles may run at the same time.
#ifndef KIMI_LOSS_LOGPROB_TILE_H_
#define KIMI_LOSS_LOGPROB_TILE_H_

#include <cstdint>

#include "base/instruction_set.h"

namespace kimi {

// The shape of the logits, and what turns them into scores.
struct TileHead {
  int64_t rows;
  int64_t vocab;
  const float* bias;  // [vocab], or null for none.
  float softcap;      // 0: none.
  float temperature;
};

// Statistics of each row, [rows] each.
struct TileStatistics {
  float* top;     // The largest score.
  double* total;  // Sum over the vocabulary of e = exp((score - top) / temperature).
  float* picked;  // (target's score - top) / temperature; 0 without a target.
  // Sum of e * (score - top) / temperature. The entropy is log(total) - weighted / total.
  double* weighted;
};

// Fills `statistics` from the logits, which stay unchanged.
//
// REQUIRES: vocab > 0, temperature > 0, softcap >= 0, threads > 0; `targets` in [-1, vocab), with
// -1 for a row whose target is in another part of the vocabulary; `set` is available.
void FillTileStatistics(const TileHead& head, const float* logits, const int64_t* targets,
                        const TileStatistics& statistics, int threads, InstructionSet set);

// Overwrites each row of logits with the gradient of outer * logprob(target) with respect to the
// logits. The row's statistics may be those of a vocabulary that this tile is only a part of.
//
// REQUIRES: as FillTileStatistics.
void GradientInPlace(const TileHead& head, float* logits, const int64_t* targets, const float* top,
                     const double* total, const float* outer, int threads, InstructionSet set);

}  // namespace kimi

#endif  // KIMI_LOSS_LOGPROB_TILE_H_
