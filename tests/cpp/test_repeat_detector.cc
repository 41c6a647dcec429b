#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.h"
#include "text/repeat_detector.h"

namespace kimi {
namespace {

// The reference: counts windows in an ordered map of the windows themselves.
class ModelDetector {
 public:
  ModelDetector(size_t window, int64_t count) : window_(window), count_(count) {}

  bool Push(int32_t token) {
    recent_.push_back(token);
    if (recent_.size() > window_) recent_.erase(recent_.begin());
    return recent_.size() == window_ && ++occurrences_[recent_] >= count_;
  }

 private:
  size_t window_;
  int64_t count_;
  std::vector<int32_t> recent_;
  std::map<std::vector<int32_t>, int64_t> occurrences_;
};

void TestWorkedExample() {
  RepeatDetector detector(/*window=*/2, /*count=*/3);
  const std::vector<int32_t> tokens = {5, 6, 5, 6, 9, 5, 6};
  CHECK_EQ(detector.Extend(tokens), 6);  // 5 6 occurs at 0, 2 and 5.
  CHECK_EQ(detector.size(), tokens.size());
}

void TestOccurrencesOverlap() {
  RepeatDetector detector(/*window=*/3, /*count=*/2);
  const std::vector<int32_t> tokens = {1, 1, 1, 1};
  CHECK_EQ(detector.Extend(tokens), 3);
}

void TestAgreesWithModel() {
  std::mt19937 random(7);
  for (const auto& [window, count] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 2}, {1, 40}, {2, 3}, {5, 2}, {17, 4}}) {
    RepeatDetector detector(window, count);
    ModelDetector model(static_cast<size_t>(window), count);
    int disagreements = 0;
    for (int i = 0; i < 3000; ++i) {  // About 3000 distinct windows, so the table grows many times.
      const int32_t token = static_cast<int32_t>(random() % 3) - 1;
      disagreements += detector.Push(token) != model.Push(token);
    }
    CHECK_EQ(disagreements, 0);
  }
}

// Two different windows of two tokens with the same hash. Euclid's algorithm on (kPrime, kBase)
// keeps remainder == coefficient * kBase modulo kPrime. Half-way through, both are below 2^32, so
// adding (coefficient, -remainder) to a window changes its tokens but not its hash.
std::pair<std::vector<int32_t>, std::vector<int32_t>> CollidingWindows() {
  int64_t previous = RepeatDetector::kPrime, remainder = RepeatDetector::kBase;
  int64_t previous_coefficient = 0, coefficient = 1;
  while (remainder >= int64_t{1} << 31) {
    const int64_t quotient = previous / remainder;
    previous = std::exchange(remainder, previous - quotient * remainder);
    previous_coefficient =
        std::exchange(coefficient, previous_coefficient - quotient * coefficient);
  }
  const auto token = [](int64_t digit) { return static_cast<int32_t>(digit); };
  if (coefficient < 0) return {{token(-coefficient), token(remainder)}, {0, 0}};
  return {{0, token(remainder)}, {token(coefficient), 0}};
}

void TestCollidingWindowsAreCountedApart() {
  const auto [a, b] = CollidingWindows();
  const auto hash = [](const std::vector<int32_t>& window) {
    __extension__ using uint128 = unsigned __int128;
    const uint128 digits =
        static_cast<uint128>(window[0]) * RepeatDetector::kBase + static_cast<uint128>(window[1]);
    return static_cast<uint64_t>(digits % RepeatDetector::kPrime);
  };
  CHECK(a != b);
  CHECK_EQ(hash(a), hash(b));

  RepeatDetector detector(/*window=*/2, /*count=*/3);
  // 7, 8, ... are between the windows.
  const std::vector<int32_t> twice_each = {a[0], a[1], 7, b[0], b[1], 8,
                                           a[0], a[1], 9, b[0], b[1], 10};
  CHECK_EQ(detector.Extend(twice_each), -1);
  CHECK(!detector.Push(a[0]));
  CHECK(detector.Push(a[1]));
  CHECK(!detector.Push(11));
  CHECK(!detector.Push(b[0]));
  CHECK(detector.Push(b[1]));
}

void TestConstructorNamesValueAndBound() {
  using test::MessageOf;
  CHECK_EQ(MessageOf<std::invalid_argument>([] { RepeatDetector(0, 2); }),
           "window = 0: it must be at least 1");
  CHECK_EQ(MessageOf<std::invalid_argument>([] { RepeatDetector(1, 1); }),
           "count = 1: it must be at least 2");
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestWorkedExample();
  kimi::TestOccurrencesOverlap();
  kimi::TestAgreesWithModel();
  kimi::TestCollidingWindowsAreCountedApart();
  kimi::TestConstructorNamesValueAndBound();
  return kimi::test::Failures();
}
