// Checks for the C++ tests, which need no test framework. A failed check prints its place and text,
// and the test continues. main() ends with `return kimi::test::Failures();`.
#ifndef KIMI_TESTS_CPP_CHECK_H_
#define KIMI_TESTS_CPP_CHECK_H_

#include <iostream>
#include <string>

namespace kimi::test {

inline int failures = 0;

// The exit status of the test.
inline int Failures() { return failures == 0 ? 0 : 1; }

inline void Check(bool passed, const char* file, int line, const std::string& what) {
  if (passed) return;
  ++failures;
  std::cerr << file << ':' << line << ": " << what << '\n';
}

// The values must be comparable and printable.
template <typename Actual, typename Expected>
void CheckEqual(const Actual& actual, const Expected& expected, const char* file, int line,
                const char* what) {
  if (actual == expected) return;
  Check(false, file, line, what);
  std::cerr << "  got " << actual << ", expected " << expected << '\n';
}

// Runs `function` and returns the message of the Error that it throws, or "" if it throws none.
template <typename Error, typename Function>
std::string MessageOf(Function function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace kimi::test

#define CHECK(condition) ::kimi::test::Check((condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(actual, expected) \
  ::kimi::test::CheckEqual((actual), (expected), __FILE__, __LINE__, #actual " == " #expected)

#endif  // KIMI_TESTS_CPP_CHECK_H_
