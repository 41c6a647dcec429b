#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "loss/logprob_tile.h"

namespace kimi {
namespace {

struct Tile {
  std::vector<float> logits, bias, outer;
  std::vector<int64_t> targets;
};

Tile MakeTile(int64_t rows, int64_t vocab) {
  std::mt19937 random(static_cast<uint32_t>(vocab));
  std::normal_distribution<float> normal(0, 4);
  Tile tile;
  for (int64_t i = 0; i < rows * vocab; ++i) tile.logits.push_back(normal(random));
  for (int64_t i = 0; i < vocab; ++i) tile.bias.push_back(normal(random) / 4);
  for (int64_t i = 0; i < rows; ++i) {
    tile.outer.push_back(normal(random));
    tile.targets.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(vocab)));
  }
  return tile;
}

// The reference: one row in long double.
struct Model {
  Model(const TileHead& head, const float* logits, int64_t target) {
    long double sum = 0;
    for (int64_t i = 0; i < head.vocab; ++i) {
      long double score = static_cast<long double>(logits[i]) + head.bias[i];
      long double slope = 1;
      if (head.softcap != 0) {
        score = head.softcap * std::tanh(score / head.softcap);
        slope = 1 - score / head.softcap * (score / head.softcap);
      }
      gradient.push_back(slope / head.temperature);
      scores.push_back(score / head.temperature);
      sum += std::exp(scores.back());
    }
    logprob = scores[static_cast<size_t>(target)] - std::log(sum);
    for (size_t i = 0; i < scores.size(); ++i) {
      const long double p = std::exp(scores[i]) / sum;
      entropy -= p * (scores[i] - std::log(sum));
      gradient[i] *= static_cast<int64_t>(i) == target ? 1 - p : -p;
    }
  }

  std::vector<long double> scores, gradient;
  long double logprob = 0, entropy = 0;
};

// Rows end at every position of a vector. Under the sanitizers this shows that no pass reads or
// writes past the end of a row.
void TestAgreesWithModel(InstructionSet set, float softcap, float temperature) {
  const int64_t rows = 3;
  for (const int64_t vocab : {1, 2, 7, 8, 16, 31, 33, 127, 130}) {
    Tile tile = MakeTile(rows, vocab);
    const TileHead head{rows, vocab, tile.bias.data(), softcap, temperature};
    std::vector<Model> models;
    for (int64_t row = 0; row < rows; ++row) {
      models.emplace_back(head, tile.logits.data() + row * vocab,
                          tile.targets[static_cast<size_t>(row)]);
    }
    std::vector<float> top(3), picked(3);
    std::vector<double> total(3), weighted(3);
    FillTileStatistics(head, tile.logits.data(), tile.targets.data(),
                       {top.data(), total.data(), picked.data(), weighted.data()}, 2, set);
    GradientInPlace(head, tile.logits.data(), tile.targets.data(), top.data(), total.data(),
                    tile.outer.data(), 2, set);
    for (size_t row = 0; row < 3; ++row) {
      const double logprob = picked[row] - std::log(total[row]);
      const double entropy = std::log(total[row]) - weighted[row] / total[row];
      CHECK(std::abs(logprob - static_cast<double>(models[row].logprob)) < 1e-5);
      CHECK(std::abs(entropy - static_cast<double>(models[row].entropy)) < 1e-5);
      for (size_t i = 0; i < static_cast<size_t>(vocab); ++i) {
        const double expected = static_cast<double>(tile.outer[row] * models[row].gradient[i]);
        CHECK(std::abs(tile.logits[row * static_cast<size_t>(vocab) + i] - expected) < 1e-5);
      }
    }
  }
}

}  // namespace
}  // namespace kimi

int main() {
  const auto sets = kimi::AvailableInstructionSets();
  CHECK(!sets.empty() && sets.front() == kimi::InstructionSet::kPortable);
  for (const auto set : sets) {
    for (const float softcap : {0.0f, 3.0f}) {
      for (const float temperature : {1.0f, 0.6f}) {
        kimi::TestAgreesWithModel(set, softcap, temperature);
      }
    }
  }
  return kimi::test::Failures();
}
