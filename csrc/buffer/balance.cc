#include "buffer/balance.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>

namespace kimi {

std::vector<std::vector<size_t>> Balance(std::span<const uint64_t> sizes, uint64_t most) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return sizes[a] > sizes[b]; });
  if (order.empty()) return {};
  if (sizes[order[0]] > most) {
    throw std::invalid_argument("Cannot make micro-batches of at most " + std::to_string(most) +
                                " tokens: item " + std::to_string(order[0]) + " alone has " +
                                std::to_string(sizes[order[0]]) + "; raise max_tokens");
  }
  const uint64_t total = std::accumulate(sizes.begin(), sizes.end(), uint64_t{0});
  for (size_t count = total == 0 ? 1 : (total - 1) / most + 1;; ++count) {
    std::vector<std::vector<size_t>> batches(count);
    using Filled = std::pair<uint64_t, size_t>;  // Tokens in a batch, and its index.
    std::priority_queue<Filled, std::vector<Filled>, std::greater<>> filled;  // Emptiest on top.
    for (size_t batch = 0; batch < count; ++batch) filled.emplace(0, batch);
    bool fits = true;
    for (const size_t item : order) {
      const auto [tokens, batch] = filled.top();
      fits = tokens + sizes[item] <= most;
      if (!fits) break;
      filled.pop();
      filled.emplace(tokens + sizes[item], batch);
      batches[batch].push_back(item);
    }
    if (!fits) continue;
    for (auto& batch : batches) std::sort(batch.begin(), batch.end());
    return batches;
  }
}

}  // namespace kimi
