#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "attention/decode.h"
#include "check.h"

namespace kimi {
namespace {

struct Step {
  DecodeShape shape;
  int64_t positions;  // That are stored; more than any row has.
  std::vector<float> query, keys, values;
  std::vector<int64_t> lengths;
};

Step MakeStep(const DecodeShape& shape, const std::vector<int64_t>& lengths) {
  std::mt19937 random(static_cast<uint32_t>(shape.dim));
  std::normal_distribution<float> normal(0, 1);
  Step step{shape, *std::max_element(lengths.begin(), lengths.end()), {}, {}, {}, lengths};
  const int64_t stored = shape.rows * shape.kv_heads * step.positions * shape.dim;
  for (int64_t i = 0; i < shape.rows * shape.kv_heads * shape.group * shape.dim; ++i) {
    step.query.push_back(normal(random));
  }
  for (int64_t i = 0; i < stored; ++i) {
    step.keys.push_back(normal(random));
    step.values.push_back(normal(random));
  }
  return step;
}

std::vector<Bfloat16> Rounded(std::vector<float>& numbers) {
  std::vector<Bfloat16> rounded;
  for (float& number : numbers) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    bits &= 0xffff0000u;
    rounded.push_back({static_cast<uint16_t>(bits >> 16)});
    std::memcpy(&number, &bits, sizeof bits);
  }
  return rounded;
}

// The plain formula for one query head, in long double.
std::vector<double> Reference(const Step& step, int64_t row, int64_t head) {
  const DecodeShape& s = step.shape;
  const int64_t stored = (row * s.kv_heads + head / s.group) * step.positions * s.dim;
  const float* query = step.query.data() + (row * s.kv_heads * s.group + head) * s.dim;
  const int64_t length = step.lengths[static_cast<size_t>(row)];
  std::vector<long double> scores, out(static_cast<size_t>(s.dim));
  const int64_t first = s.window > 0 ? std::max<int64_t>(0, length - s.window) : 0;
  for (int64_t p = first; p < length; ++p) {
    long double score = 0;
    for (int64_t d = 0; d < s.dim; ++d) {
      score += static_cast<long double>(query[d]) *
               step.keys[static_cast<size_t>(stored + p * s.dim + d)];
    }
    scores.push_back(score * s.scale);
  }
  const long double top = *std::max_element(scores.begin(), scores.end());
  long double total = 0;
  for (int64_t p = first; p < length; ++p) {
    const long double e = std::exp(scores[static_cast<size_t>(p - first)] - top);
    total += e;
    for (int64_t d = 0; d < s.dim; ++d) {
      out[static_cast<size_t>(d)] += e * step.values[static_cast<size_t>(stored + p * s.dim + d)];
    }
  }
  std::vector<double> divided;
  for (const long double sum : out) divided.push_back(static_cast<double>(sum / total));
  return divided;
}

template <typename Stored>
void CheckStep(const Step& step, const Stored* keys, const Stored* values) {
  const DecodeShape& s = step.shape;
  const int64_t head_stride = step.positions * s.dim, row_stride = s.kv_heads * head_stride;
  for (const InstructionSet set : AvailableInstructionSets()) {
    std::vector<float> out(step.query.size());
    DecodeAttention<Stored>(s, step.query.data(), {keys, row_stride, head_stride},
                            {values, row_stride, head_stride}, step.lengths.data(), out.data(), 3,
                            set);
    double error = 0;
    for (int64_t row = 0; row < s.rows; ++row) {
      for (int64_t head = 0; head < s.kv_heads * s.group; ++head) {
        const std::vector<double> expected = Reference(step, row, head);
        const size_t begin = static_cast<size_t>((row * s.kv_heads * s.group + head) * s.dim);
        for (size_t d = 0; d < expected.size(); ++d) {
          error = std::max(error, std::abs(static_cast<double>(out[begin + d]) - expected[d]));
        }
      }
    }
    CHECK(error < 1e-5);
  }
}

void TestShapes() {
  const std::vector<int64_t> lengths = {1, 37, 64, 33, 4500};
  for (const int64_t group : {1, 2, 3, 4, 5, 8}) {
    for (const int64_t dim : {3, 16, 64, 72}) {
      for (const int64_t window : {0, 40}) {
        Step step = MakeStep({5, 2, group, dim, window, 0.5f}, lengths);
        CheckStep(step, step.keys.data(), step.values.data());
        const std::vector<Bfloat16> keys = Rounded(step.keys), values = Rounded(step.values);
        CheckStep(step, keys.data(), values.data());
      }
    }
  }
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestShapes();
  return kimi::test::Failures();
}
