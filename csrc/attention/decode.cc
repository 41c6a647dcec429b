#include "attention/decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <thread>
#include <type_traits>
#include <vector>

#include "attention/decode_chunk.h"

namespace kimi {
namespace {

constexpr int64_t kChunk = 2048;
// One more thread costs about 20 us, in which this much is read.
constexpr int64_t kBytesPerThread = 1 << 20;

// A chunk of one row and one key head.
struct Piece {
  int64_t row, head, begin, count;
};

ChunkPasses PassesFor(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) return Avx512ChunkPasses();
  if (set == InstructionSet::kAvx2) return Avx2ChunkPasses();
#endif
  (void)set;
  return PortableChunkPasses();
}

// The pieces of a row and a head follow one another, the first position first.
std::vector<Piece> Cut(const DecodeShape& shape, const int64_t* lengths) {
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const int64_t length = lengths[row];
    const int64_t first = shape.window > 0 ? std::max<int64_t>(0, length - shape.window) : 0;
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      for (int64_t begin = first; begin < length; begin += kChunk) {
        pieces.push_back({row, head, begin, std::min(kChunk, length - begin)});
      }
    }
  }
  return pieces;
}

// Results of all pieces in one allocation.
class Results {
 public:
  Results(size_t pieces, const DecodeShape& shape)
      : group_(shape.group),
        size_(shape.group * (2 + shape.dim)),
        numbers_(pieces * static_cast<size_t>(size_)) {}

  ChunkResult Of(size_t piece) {
    float* begin = numbers_.data() + piece * static_cast<size_t>(size_);
    return {begin, begin + group_, begin + 2 * group_};
  }

 private:
  int64_t group_, size_;
  std::vector<float> numbers_;
};

// Merges the results of pieces [begin, end), which are those of one row and one key head.
void Merge(const DecodeShape& shape, Results& results, size_t begin, size_t end, float* out) {
  for (int64_t head = 0; head < shape.group; ++head, out += shape.dim) {
    float top = results.Of(begin).top[head], total = 0;
    for (size_t i = begin; i < end; ++i) top = std::max(top, results.Of(i).top[head]);
    std::fill_n(out, shape.dim, 0.0f);
    for (size_t i = begin; i < end; ++i) {
      const ChunkResult part = results.Of(i);
      const float factor = std::exp(part.top[head] - top);
      total += factor * part.total[head];
      const float* sums = part.sums + head * shape.dim;
      for (int64_t d = 0; d < shape.dim; ++d) out[d] += factor * sums[d];
    }
    for (int64_t d = 0; d < shape.dim; ++d) out[d] /= total;
  }
}

// Calls `work` for every index below `count`, on up to `threads` threads.
template <typename Work>
void Share(size_t count, int threads, Work work) {
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i);
  };
  std::vector<std::jthread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run);
  run();
}

}  // namespace

template <typename Stored>
void DecodeAttention(const DecodeShape& shape, const float* query, const Cached<Stored>& keys,
                     const Cached<Stored>& values, const int64_t* lengths, float* out, int threads,
                     InstructionSet set) {
  const ChunkPasses passes = PassesFor(set);
  ChunkPass<Stored> pass;
  if constexpr (std::is_same_v<Stored, float>) {
    pass = passes.float32;
  } else {
    pass = passes.bfloat16;
  }
  const std::vector<Piece> pieces = Cut(shape, lengths);
  Results results(pieces.size(), shape);
  int64_t bytes = 0;
  for (const Piece& piece : pieces) {
    bytes += 2 * piece.count * shape.dim * static_cast<int64_t>(sizeof(Stored));
  }
  const int useful = static_cast<int>(std::min<int64_t>(threads, 1 + bytes / kBytesPerThread));
  std::vector<float> scaled(query, query + shape.rows * shape.kv_heads * shape.group * shape.dim);
  for (float& number : scaled) number *= shape.scale;
  const int64_t query_size = shape.group * shape.dim;
  Share(pieces.size(), useful, [&](size_t i) {
    const Piece& piece = pieces[i];
    const int64_t begin = piece.begin * shape.dim;
    pass(scaled.data() + (piece.row * shape.kv_heads + piece.head) * query_size,
         keys.data + piece.row * keys.row_stride + piece.head * keys.head_stride + begin,
         values.data + piece.row * values.row_stride + piece.head * values.head_stride + begin,
         piece.count, shape.group, shape.dim, results.Of(i));
  });
  for (size_t begin = 0, end; begin < pieces.size(); begin = end) {
    const Piece& piece = pieces[begin];
    for (end = begin + 1; end < pieces.size(); ++end) {
      if (pieces[end].row != piece.row || pieces[end].head != piece.head) break;
    }
    Merge(shape, results, begin, end, out + (piece.row * shape.kv_heads + piece.head) * query_size);
  }
}

template void DecodeAttention(const DecodeShape&, const float*, const Cached<float>&,
                              const Cached<float>&, const int64_t*, float*, int, InstructionSet);
template void DecodeAttention(const DecodeShape&, const float*, const Cached<Bfloat16>&,
                              const Cached<Bfloat16>&, const int64_t*, float*, int, InstructionSet);

}  // namespace kimi
