// Choosing from many: prompts in proportion to how often they fail, and micro-batches of like size.
//
// Synchronisation: none needed; these are pure functions of their arguments.
#ifndef KIMI_BUFFER_DRAW_H_
#define KIMI_BUFFER_DRAW_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kimi {

// Draws `count` different indices, each time in proportion to the weights of those that are left;
// fewer only where fewer have any weight. The same seed gives the same draw on every machine:
// weights are integers, so no sum is rounded.
// REQUIRES: the weights add up to less than 2^64.
std::vector<int64_t> DrawDistinct(std::span<const uint64_t> weights, size_t count, uint64_t seed);

// The weight of a success rate in [0, 1]: in proportion to max(1 - rate, floor), at least 1.
uint64_t FailureWeight(double rate, double floor);

// Distributes items over the fewest batches of at most `most` that it finds, the sizes of which are
// about the same: the largest item first, each into the emptiest batch. Returns their indices,
// ascending in each batch. Throws std::invalid_argument where one item alone is larger.
std::vector<std::vector<size_t>> Balance(std::span<const uint64_t> sizes, uint64_t most);

}  // namespace kimi

#endif  // KIMI_BUFFER_DRAW_H_
