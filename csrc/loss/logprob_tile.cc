#include "loss/logprob_tile.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "loss/logprob_rows.h"

namespace kimi {
namespace {

RowPasses PassesFor(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) return Avx512RowPasses();
  if (set == InstructionSet::kAvx2) return Avx2RowPasses();
#endif
  (void)set;
  return PortableRowPasses();
}

// Calls `pass` on every row. All rows cost the same, so each thread takes an equal share.
template <typename Pass>
void ForEachRow(int64_t rows, int threads, Pass pass) {
  const int64_t share = (rows + threads - 1) / threads;
  const auto run = [&](int64_t begin) {
    for (int64_t row = begin; row < std::min(rows, begin + share); ++row) pass(row);
  };
  std::vector<std::jthread> others;
  for (int64_t begin = share; begin < rows; begin += share) others.emplace_back(run, begin);
  run(0);
}

}  // namespace

void FillTileStatistics(const TileHead& head, const float* logits, const int64_t* targets,
                        const TileStatistics& statistics, int threads, InstructionSet set) {
  const RowPasses passes = PassesFor(set);
  ForEachRow(head.rows, threads, [&](int64_t row) {
    const RowStatistics found = passes.statistics(head, logits + row * head.vocab, targets[row]);
    statistics.top[row] = found.top;
    statistics.total[row] = found.total;
    statistics.picked[row] = found.picked;
    statistics.weighted[row] = found.weighted;
  });
}

void GradientInPlace(const TileHead& head, float* logits, const int64_t* targets, const float* top,
                     const double* total, const float* outer, int threads, InstructionSet set) {
  const RowPasses passes = PassesFor(set);
  ForEachRow(head.rows, threads, [&](int64_t row) {
    passes.gradient(head, logits + row * head.vocab, targets[row], top[row], total[row],
                    outer[row]);
  });
}

}  // namespace kimi
