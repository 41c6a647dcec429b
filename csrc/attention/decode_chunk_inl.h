// The pass over one chunk, written once for vectors of KIMI_VECTOR_BYTES (see vectors_inl.h).

#include <cstdint>
#include <cstring>

#include "attention/decode_chunk.h"
#include "base/vectors_inl.h"

namespace kimi {
namespace {

// Positions whose scores are computed before their values are read; both fit into the L1 cache.
constexpr int kBlock = 32;
// Query heads and positions that are computed together. Their 12 sums, and the vectors that go into
// them, fit into 16 registers.
constexpr int kHeads = 3;
constexpr int kPositions = 4;
static_assert(kBlock % kLanes == 0 && kBlock % kPositions == 0);

using Scores = float[kHeads][kBlock];

inline Floats Load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats Load(const Bfloat16* from) {
  using Shorts = uint16_t __attribute__((vector_size(KIMI_VECTOR_BYTES / 2)));
  Shorts upper;
  std::memcpy(&upper, from, sizeof upper);
  const Ints bits = __builtin_convertvector(upper, Ints) << 16;
  Floats values;
  std::memcpy(&values, &bits, sizeof values);
  return values;
}

inline float Load1(const float* from) { return *from; }

inline float Load1(const Bfloat16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Asks for the memory from `begin` on, which may lie beyond what is stored: nothing is read then.
// Without it a block waits for its first lines, because the processor's own prefetch ends at a
// page.
inline void Prefetch(const void* begin, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(static_cast<const char*>(begin) + line);
  }
}

inline float Sum(Floats values) {
  float halves[kLanes];
  std::memcpy(halves, &values, sizeof values);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) halves[lane] += halves[lane + width];
  }
  return halves[0];
}

// In every 16 bytes: the sums of neighbours, two of `a` and then two of `b`.
inline Floats SumPairs(Floats a, Floats b) {
#if KIMI_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif KIMI_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// The sum of each of four vectors.
inline void Sum4(const Floats (&vectors)[kPositions], float* sums) {
  using Four = float __attribute__((vector_size(16)));
  const Floats parts = SumPairs(SumPairs(vectors[0], vectors[1]), SumPairs(vectors[2], vectors[3]));
  Four each[kLanes / 4];
  std::memcpy(each, &parts, sizeof parts);
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) each[i] += each[i + width];
  }
  std::memcpy(sums, each, sizeof(Four));
}

inline float Largest(const float* scores) {
  Floats top = Load(scores);
  for (int begin = kLanes; begin < kBlock; begin += kLanes) {
    const Floats next = Load(scores + begin);
    top = next > top ? next : top;
  }
  float largest = top[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  return largest;
}

// Scores of kPositions positions, from number `at` of the block on. `count` of them exist, and the
// others get the score of the last one.
template <int Heads, typename Stored>
void FillFour(const float* query, const Stored* keys, int64_t count, int64_t dim, int64_t at,
              Scores& scores) {
  const Stored* key[kPositions];
  for (int64_t p = 0; p < kPositions; ++p) key[p] = keys + (p < count ? p : count - 1) * dim;
  Floats sums[Heads][kPositions] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Floats q[Heads];
    for (int head = 0; head < Heads; ++head) q[head] = Load(query + head * dim + d);
    for (int p = 0; p < kPositions; ++p) {
      const Floats k = Load(key[p] + d);
      for (int head = 0; head < Heads; ++head) sums[head][p] += q[head] * k;
    }
  }
  for (int head = 0; head < Heads; ++head) {
    Sum4(sums[head], scores[head] + at);
    for (int64_t rest = d; rest < dim; ++rest) {
      for (int p = 0; p < kPositions; ++p) {
        scores[head][at + p] += query[head * dim + rest] * Load1(key[p] + rest);
      }
    }
  }
}

// Scores of `count` positions; those that are missing in the block get minus infinity.
template <int Heads, typename Stored>
void FillScores(const float* query, const Stored* keys, const Stored* values, int64_t count,
                int64_t dim, Scores& scores) {
  for (int64_t p = 0; p < count; p += kPositions) {
    const int64_t bytes = kPositions * dim * static_cast<int64_t>(sizeof(Stored));
    Prefetch(values + p * dim, bytes);
    FillFour<Heads>(query, keys + p * dim, count - p, dim, p, scores);
  }
  for (int head = 0; head < Heads; ++head) {
    for (int64_t p = count; p < kBlock; ++p) scores[head][p] = -kInfinity;
  }
}

// Turns scores into exp(score - top), and what earlier blocks have summed to the new top.
void Exponentials(float* scores, float* top, float* total, float* sums, int64_t dim) {
  const float largest = Largest(scores);
  if (largest > *top) {
    const float factor = ExpOfNegative(Splat(*top - largest))[0];
    *top = largest;
    *total *= factor;
    for (int64_t d = 0; d < dim; ++d) sums[d] *= factor;
  }
  Floats added = {};
  for (int begin = 0; begin < kBlock; begin += kLanes) {
    const Floats e = ExpOfNegative(Load(scores + begin) - *top);
    std::memcpy(scores + begin, &e, sizeof e);
    added += e;
  }
  *total += Sum(added);
}

// Adds weight * value for `Vectors` vectors of the values, from number `d` on.
template <int Heads, int Vectors, typename Stored>
void AddVectors(const Scores& weights, const Stored* values, int64_t count, int64_t dim,
                float* sums) {
  Floats added[Heads][Vectors];
  for (int head = 0; head < Heads; ++head) {
    for (int v = 0; v < Vectors; ++v) added[head][v] = Load(sums + head * dim + v * kLanes);
  }
  for (int64_t position = 0; position < count; ++position) {
    Floats value[Vectors];
    for (int v = 0; v < Vectors; ++v) value[v] = Load(values + position * dim + v * kLanes);
    for (int head = 0; head < Heads; ++head) {
      const float weight = weights[head][position];
      for (int v = 0; v < Vectors; ++v) added[head][v] += weight * value[v];
    }
  }
  for (int head = 0; head < Heads; ++head) {
    for (int v = 0; v < Vectors; ++v) {
      std::memcpy(sums + head * dim + v * kLanes, &added[head][v], sizeof(Floats));
    }
  }
}

template <int Heads, typename Stored>
void AddValues(const Scores& weights, const Stored* keys, const Stored* values, int64_t count,
               int64_t dim, float* sums) {
  constexpr int kVectors = Heads < 3 ? 4 : 2;  // With more, the sums would leave the registers.
  int64_t d = 0;
  const int64_t bytes = count * kVectors * kLanes * static_cast<int64_t>(sizeof(Stored));
  const char* next = reinterpret_cast<const char*>(keys + kBlock * dim);
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes, next += bytes) {
    Prefetch(next, bytes);
    AddVectors<Heads, kVectors>(weights, values + d, count, dim, sums + d);
  }
  for (; d + kLanes <= dim; d += kLanes) {
    AddVectors<Heads, 1>(weights, values + d, count, dim, sums + d);
  }
  for (; d < dim; ++d) {
    for (int head = 0; head < Heads; ++head) {
      for (int64_t position = 0; position < count; ++position) {
        sums[head * dim + d] += weights[head][position] * Load1(values + position * dim + d);
      }
    }
  }
}

template <int Heads, typename Stored>
void PassBlock(const float* query, const Stored* keys, const Stored* values, int64_t count,
               int64_t dim, float* top, float* total, float* sums) {
  Scores scores;
  FillScores<Heads>(query, keys, values, count, dim, scores);
  for (int head = 0; head < Heads; ++head) {
    Exponentials(scores[head], top + head, total + head, sums + head * dim, dim);
  }
  AddValues<Heads>(scores, keys, values, count, dim, sums);
}

template <typename Stored>
void PassChunk(const float* query, const Stored* keys, const Stored* values, int64_t positions,
               int64_t group, int64_t dim, const ChunkResult& result) {
  for (int64_t head = 0; head < group; ++head) {
    result.top[head] = -kInfinity;
    result.total[head] = 0;
  }
  std::memset(result.sums, 0, static_cast<size_t>(group * dim) * sizeof(float));
  for (int64_t begin = 0; begin < positions; begin += kBlock) {
    const int64_t left = positions - begin, count = left < kBlock ? left : kBlock;
    for (int64_t head = 0; head < group;) {
      const auto pass = [&]<int Heads>() {
        PassBlock<Heads>(query + head * dim, keys + begin * dim, values + begin * dim, count, dim,
                         result.top + head, result.total + head, result.sums + head * dim);
        head += Heads;
      };
      switch (group - head) {
        case 1:
          pass.template operator()<1>();
          break;
        case 2:
        case 4:
          pass.template operator()<2>();
          break;
        default:
          pass.template operator()<kHeads>();
      }
    }
  }
}

}  // namespace
}  // namespace kimi
