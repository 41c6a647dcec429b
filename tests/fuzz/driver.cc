// Runs a fuzz target without libFuzzer: the inputs of a folder, then random edits of them.
//
//   fuzz_buffer CORPUS SECONDS [SEED]
//
// It has no feedback from coverage, so it finds less, but it needs no clang.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "../cpp/files.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void Run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

std::string Edit(std::string input, std::mt19937_64& random) {
  for (uint64_t edits = 1 + random() % 4; edits > 0; --edits) {
    const uint64_t kind = random() % 3;
    if (kind == 0 || input.empty()) {  // A further edit of the file.
      for (int i = 0; i < 5; ++i) input.push_back(static_cast<char>(random()));
      const uint64_t count = random() % 9;
      input.push_back(static_cast<char>(count));
      for (uint64_t i = 0; i < count; ++i) input.push_back(static_cast<char>(random()));
    } else if (kind == 1) {
      input[random() % input.size()] = static_cast<char>(random());
    } else {
      input.resize(random() % (input.size() + 1));
    }
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s CORPUS SECONDS [SEED]\n", argv[0]);
    return 2;
  }
  std::vector<std::string> corpus = {""};
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
    corpus.push_back(kimi::test::Contents(entry.path().string()));
  }
  for (const std::string& input : corpus) Run(input);
  std::mt19937_64 random(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0);
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::milliseconds(static_cast<int64_t>(1000 * std::atof(argv[2])));
  uint64_t runs = corpus.size();
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    Run(Edit(corpus[random() % corpus.size()], random));
  }
  std::printf("%llu inputs, none of them broke it\n", static_cast<unsigned long long>(runs));
  return 0;
}
