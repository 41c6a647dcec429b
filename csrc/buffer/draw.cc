#include "buffer/draw.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>

namespace kimi {
namespace {

// splitmix64 (Steele, Lea and Flood, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // Uniform in [0, bound), but for a bias below 2^-64 * bound.
  uint64_t Below(uint64_t bound) {
    __extension__ using uint128 = unsigned __int128;
    return static_cast<uint64_t>(static_cast<uint128>(Next()) * bound >> 64);
  }

 private:
  uint64_t Next() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

  uint64_t state_;
};

// Running sums of weights that shrink, both in logarithmic time (Fenwick, 1994).
class RunningSums {
 public:
  explicit RunningSums(std::span<const uint64_t> weights)
      : sums_(weights.begin(), weights.end()),
        total_(std::accumulate(weights.begin(), weights.end(), uint64_t{0})) {
    for (size_t i = 1; i <= sums_.size(); ++i) {
      const size_t parent = i + (i & (~i + 1));
      if (parent <= sums_.size()) sums_[parent - 1] += sums_[i - 1];
    }
  }

  uint64_t total() const { return total_; }

  // The index in whose share of the total `point` lies. REQUIRES: point < total().
  size_t Find(uint64_t point) const {
    size_t index = 0;
    for (size_t step = std::bit_floor(sums_.size()); step > 0; step /= 2) {
      if (index + step <= sums_.size() && sums_[index + step - 1] <= point) {
        index += step;
        point -= sums_[index - 1];
      }
    }
    return index;
  }

  void Remove(size_t index, uint64_t weight) {
    total_ -= weight;
    for (size_t i = index + 1; i <= sums_.size(); i += i & (~i + 1)) sums_[i - 1] -= weight;
  }

 private:
  std::vector<uint64_t> sums_;
  uint64_t total_;
};

}  // namespace

std::vector<int64_t> DrawDistinct(std::span<const uint64_t> weights, size_t count, uint64_t seed) {
  RunningSums sums(weights);
  Random random(seed);
  std::vector<int64_t> drawn;
  while (drawn.size() < count && sums.total() > 0) {
    const size_t index = sums.Find(random.Below(sums.total()));
    drawn.push_back(static_cast<int64_t>(index));
    sums.Remove(index, weights[index]);
  }
  return drawn;
}

uint64_t FailureWeight(double rate, double floor) {
  constexpr double kOne = 1 << 30;  // 2^31 prompts of this weight still add up in 64 bits.
  const auto weight = static_cast<uint64_t>(kOne * std::clamp(1 - rate, floor, 1.0) + 0.5);
  return std::max(weight, uint64_t{1});
}

std::vector<std::vector<size_t>> Balance(std::span<const uint64_t> sizes, uint64_t most) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return sizes[a] > sizes[b]; });
  if (order.empty()) return {};
  if (sizes[order[0]] > most) {
    throw std::invalid_argument("Cannot make micro-batches of " + std::to_string(most) +
                                " tokens: item " + std::to_string(order[0]) + " alone has " +
                                std::to_string(sizes[order[0]]) + "; raise max_tokens");
  }
  const uint64_t total = std::accumulate(sizes.begin(), sizes.end(), uint64_t{0});
  for (size_t count = std::max<uint64_t>(1, (total + most - 1) / most);; ++count) {
    std::vector<std::vector<size_t>> batches(count);
    using Filled = std::pair<uint64_t, size_t>;  // Tokens and which batch; the emptiest on top.
    std::priority_queue<Filled, std::vector<Filled>, std::greater<>> filled;
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
