#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "buffer/balance.h"
#include "check.h"

namespace kimi {
namespace {

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
  const std::vector<uint64_t> empty = {0, 0};
  CHECK_EQ(Balance(empty, 0).size(), 1u);
  CHECK_EQ(test::MessageOf<std::invalid_argument>([&] { Balance(over, 5); }),
           "Cannot make micro-batches of at most 5 tokens: item 1 alone has 6; raise max_tokens");
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestBatchesHoldEverythingOnceAndAreEven();
  kimi::TestBatchesAtTheLimit();
  return kimi::test::Failures();
}
