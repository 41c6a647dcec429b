// Passes over a tile of logits: the softmax statistics of each row, and the gradient of its
// log-prob in place. The matrix products before and after are the caller's.
//
// A row's scores are s = (logits + bias), capped to softcap * tanh(s / softcap) if there is a cap;
// tokens are distributed as softmax(s / temperature). Everything is relative to the row's largest
// score, so no shift of the logits overflows or loses digits, and sums over the vocabulary end in
// double, so that what thousands of rows add up to does not drift (docs/numerics.md).
//
// Stateless; calls on different tiles may run side by side.
#ifndef KIMI_LOSS_LOGPROB_TILE_H_
#define KIMI_LOSS_LOGPROB_TILE_H_

#include <cstdint>
#include <vector>

namespace kimi {

// Instruction sets that the passes are compiled for, the plainest first.
enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// Those that this processor runs; the last one is the fastest. Never empty.
std::vector<InstructionSet> AvailableInstructionSets();

// What turns logits into scores, and how they are laid out.
struct TileHead {
  int64_t rows;
  int64_t vocab;
  const float* bias;  // [vocab], or null.
  float softcap;      // 0: none.
  float temperature;
};

// Row statistics, [rows] each.
struct TileStatistics {
  float* top;     // The largest score.
  double* total;  // Sum over the vocabulary of e = exp((score - top) / temperature).
  float* picked;  // The target's score - top, over the temperature; 0 where there is no target.
  double*
      weighted;  // Sum of e * (score - top) / temperature: entropy = log(total) - weighted / total.
};

// Fills `statistics` from the logits, which stay as they are.
//
// REQUIRES: vocab > 0, temperature > 0, softcap >= 0, threads > 0; `targets` in [-1, vocab), where
// -1 is a row whose target lies in another part of the vocabulary; `set` is available.
void FillTileStatistics(const TileHead& head, const float* logits, const int64_t* targets,
                        const TileStatistics& statistics, int threads, InstructionSet set);

// Overwrites each row of logits with the gradient of outer * logprob(target) in the logits, given
// the row's statistics, which may be those of a vocabulary that this tile is only a part of.
//
// REQUIRES: as above.
void GradientInPlace(const TileHead& head, float* logits, const int64_t* targets, const float* top,
                     const double* total, const float* outer, int threads, InstructionSet set);

}  // namespace kimi

#endif  // KIMI_LOSS_LOGPROB_TILE_H_
