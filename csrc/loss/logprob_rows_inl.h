// The passes over one row, written once for vectors of KIMI_VECTOR_BYTES (see vectors_inl.h).

#include <cstdint>
#include <cstring>

#include "base/vectors_inl.h"
#include "loss/logprob_rows.h"

namespace kimi {
namespace {

// Float lanes sum this many vectors, and a double then takes their sum. The rounding of eight small
// terms is smaller than the error of the exponential; that of thousands of terms would be a bias.
constexpr int kVectorsPerSum = 8;

// tanh(x), with an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose digits.
inline Floats Tanh(Floats x) {
  const Floats magnitude = x < Floats{} ? -x : x;
  const Floats e = ExpOfNegative(magnitude * -2.0f);
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats square = x * x;
  Floats p = Splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Floats near = p * square * x + x;
  return magnitude < Splat(0.625f) ? near : (x < Floats{} ? -far : far);
}

inline Floats Score(const TileHead& head, Floats logits, Floats bias) {
  const Floats sum = logits + bias;
  return head.softcap == 0 ? sum : head.softcap * Tanh(sum / head.softcap);
}

// Scores of `lanes` logits from `begin` on. Further lanes are set to minus infinity after the cap,
// so that columns that do not exist get no probability.
inline Floats Scores(const TileHead& head, const float* logits, int64_t begin, int64_t lanes) {
  Floats values, bias = {};
  if (lanes == kLanes) {
    std::memcpy(&values, logits + begin, sizeof values);
    if (head.bias != nullptr) std::memcpy(&bias, head.bias + begin, sizeof bias);
    return Score(head, values, bias);
  }
  values = Floats{};
  const size_t bytes = static_cast<size_t>(lanes) * sizeof(float);
  std::memcpy(&values, logits + begin, bytes);
  if (head.bias != nullptr) std::memcpy(&bias, head.bias + begin, bytes);
  values = Score(head, values, bias);
  for (int64_t lane = lanes; lane < kLanes; ++lane) values[lane] = -kInfinity;
  return values;
}

inline float OneScore(const TileHead& head, const float* logits, int64_t index) {
  return Scores(head, logits, index, 1)[0];
}

float Largest(const TileHead& head, const float* logits) {
  Floats top = Splat(-kInfinity);
  int64_t begin = 0;
  for (; begin + kLanes <= head.vocab; begin += kLanes) {
    const Floats scores = Scores(head, logits, begin, kLanes);
    top = scores > top ? scores : top;
  }
  if (begin < head.vocab) {
    const Floats scores = Scores(head, logits, begin, head.vocab - begin);
    top = scores > top ? scores : top;
  }
  float largest = top[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  return largest;
}

RowStatistics Statistics(const TileHead& head, const float* logits, int64_t target) {
  const float top = Largest(head, logits);
  double total[kLanes] = {}, weighted[kLanes] = {};
  for (int64_t begin = 0; begin < head.vocab;) {
    Floats sum = {}, product = {};
    for (int i = 0; i < kVectorsPerSum && begin < head.vocab; ++i, begin += kLanes) {
      const int64_t left = head.vocab - begin;
      const Floats scores = Scores(head, logits, begin, left < kLanes ? left : kLanes);
      const Floats x = (scores - top) / head.temperature;
      const Floats e = ExpOfNegative(x);
      sum += e;
      // If e is 0, x may be infinite, and their product must still be 0.
      product += e * (x < Splat(-88.0f) ? Floats{} : x);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      total[lane] += static_cast<double>(sum[lane]);
      weighted[lane] += static_cast<double>(product[lane]);
    }
  }
  RowStatistics row{top, 0, 0, 0};
  for (int lane = 0; lane < kLanes; ++lane) {
    row.total += total[lane];
    row.weighted += weighted[lane];
  }
  if (target >= 0) row.picked = (OneScore(head, logits, target) - top) / head.temperature;
  return row;
}

// d logprob / d score = (onehot - softmax) / temperature, times the slope of the cap.
void Gradient(const TileHead& head, float* logits, int64_t target, float top, double total,
              float outer) {
  const float scale = static_cast<float>(-outer / head.temperature / total);
  const float wanted = target < 0 ? 0 : OneScore(head, logits, target);
  for (int64_t begin = 0; begin < head.vocab; begin += kLanes) {
    const int64_t left = head.vocab - begin;
    const int64_t lanes = left < kLanes ? left : kLanes;
    const Floats scores = Scores(head, logits, begin, lanes);
    Floats slope = ExpOfNegative((scores - top) / head.temperature) * scale;
    if (head.softcap != 0) slope *= 1.0f - (scores / head.softcap) * (scores / head.softcap);
    std::memcpy(logits + begin, &slope, static_cast<size_t>(lanes) * sizeof(float));
  }
  if (target < 0) return;
  // 1 - p comes before the slope, so that a certain token gets a gradient of exactly 0.
  const float e = ExpOfNegative(Splat((wanted - top) / head.temperature))[0];
  const float ratio = head.softcap == 0 ? 0 : wanted / head.softcap;
  logits[target] = (e * scale + outer / head.temperature) * (1.0f - ratio * ratio);
}

}  // namespace
}  // namespace kimi
