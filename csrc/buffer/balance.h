// Splits items of different sizes into micro-batches of about equal size.
//
// Synchronisation: none needed; this is a pure function of its arguments.
#ifndef KIMI_BUFFER_BALANCE_H_
#define KIMI_BUFFER_BALANCE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kimi {

// Splits items into the fewest batches of at most `most` tokens that the method finds. The method
// takes the largest item first and puts each item into the emptiest batch. Returns the indices of
// the items of each batch in ascending order. Throws std::invalid_argument if one item alone is
// larger than `most`.
std::vector<std::vector<size_t>> Balance(std::span<const uint64_t> sizes, uint64_t most);

}  // namespace kimi

#endif  // KIMI_BUFFER_BALANCE_H_
