#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <vector>

#include "buffer/draw.h"
#include "check.h"

namespace kimi {
namespace {

void TestFirstDrawsFollowTheWeights() {
  const std::vector<uint64_t> weights = {1, 0, 2, 3, 4};
  std::vector<int> first(5), second_after_4(5);
  const int draws = 20000;
  int began_with_4 = 0;
  for (int seed = 0; seed < draws; ++seed) {
    const auto drawn = DrawDistinct(weights, 2, static_cast<uint64_t>(seed));
    ++first[static_cast<size_t>(drawn[0])];
    if (drawn[0] != 4) continue;
    ++began_with_4;
    ++second_after_4[static_cast<size_t>(drawn[1])];
  }
  for (size_t i = 0; i < 5; ++i) {
    // Five standard deviations of a binomial share, at most 0.0177 here.
    const double expected = static_cast<double>(weights[i]) / 10;
    CHECK(std::abs(first[i] / double{draws} - expected) < 0.0177);
    const double then = i == 4 ? 0 : static_cast<double>(weights[i]) / 6;
    CHECK(std::abs(second_after_4[i] / double(began_with_4) - then) < 0.028);
  }
}

void TestDrawsAreDistinctAndTakeAllThatHaveWeight() {
  for (size_t n : {1, 2, 3, 7, 8, 9, 100}) {
    std::vector<uint64_t> weights(n);
    for (size_t i = 0; i < n; ++i) weights[i] = i % 3;  // Every third has none.
    const size_t positive = n - (n + 2) / 3;
    const auto drawn = DrawDistinct(weights, n, 7);
    CHECK_EQ(drawn.size(), positive);
    CHECK_EQ(std::set<int64_t>(drawn.begin(), drawn.end()).size(), positive);
    for (const int64_t i : drawn) CHECK(weights[static_cast<size_t>(i)] > 0);
  }
  CHECK(DrawDistinct({}, 3, 0).empty());
}

void TestTheSeedDecides() {
  const std::vector<uint64_t> weights(1000, FailureWeight(0.5, 0.1));
  CHECK(DrawDistinct(weights, 9, 3) == DrawDistinct(weights, 9, 3));
  CHECK(DrawDistinct(weights, 9, 3) != DrawDistinct(weights, 9, 4));
  // The same on every machine: splitmix64 begins with 0.883, 0.4315 and 0.0264 of 2^64 here.
  const std::vector<int64_t> expected = {883, 431, 26};
  CHECK(DrawDistinct(weights, 3, 0) == expected);
}

void TestFailureWeights() {
  CHECK_EQ(FailureWeight(0, 0.05), uint64_t{1} << 30);
  CHECK_EQ(FailureWeight(0.75, 0.05), uint64_t{1} << 28);
  CHECK_EQ(FailureWeight(1, 0.25), uint64_t{1} << 28);
  CHECK_EQ(FailureWeight(1, 1e-30), 1u);
}

void TestBatchesHoldEverythingOnceAndAreEven() {
  std::vector<uint64_t> sizes;
  for (uint64_t i = 0; i < 200; ++i) sizes.push_back(1 + (i * 7919) % 997);
  const uint64_t most = 5000, total = std::accumulate(sizes.begin(), sizes.end(), uint64_t{0});
  const auto batches = Balance(sizes, most);
  std::vector<size_t> seen;
  uint64_t least = most, largest = 0;
  for (const auto& batch : batches) {
    uint64_t tokens = 0;
    for (const size_t item : batch) tokens += sizes[item];
    least = std::min(least, tokens);
    largest = std::max(largest, tokens);
    CHECK(std::is_sorted(batch.begin(), batch.end()));
    seen.insert(seen.end(), batch.begin(), batch.end());
  }
  CHECK(largest <= most);
  CHECK(largest - least <= 100);
  CHECK(batches.size() <= (total + most - 1) / most + 1);
  std::sort(seen.begin(), seen.end());
  CHECK_EQ(seen.size(), sizes.size());
  for (size_t i = 0; i < seen.size(); ++i) CHECK_EQ(seen[i], i);
}

void TestBatchesAtTheLimit() {
  CHECK(Balance({}, 5).empty());
  const std::vector<uint64_t> full = {5, 5, 5}, over = {5, 6};
  CHECK_EQ(Balance(full, 5).size(), 3u);
  CHECK_EQ(test::MessageOf<std::invalid_argument>([&] { Balance(over, 5); }),
           "Cannot make micro-batches of 5 tokens: item 1 alone has 6; raise max_tokens");
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestFirstDrawsFollowTheWeights();
  kimi::TestDrawsAreDistinctAndTakeAllThatHaveWeight();
  kimi::TestTheSeedDecides();
  kimi::TestFailureWeights();
  kimi::TestBatchesHoldEverythingOnceAndAreEven();
  kimi::TestBatchesAtTheLimit();
  return kimi::test::Failures();
}
