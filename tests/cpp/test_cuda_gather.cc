// The arithmetic of the gather kernel, on the host and on pages that the buffer has copied.
#include <cstdint>
#include <vector>

#include "buffer_testing.h"
#include "check.h"
#include "cuda/gather.h"

namespace kimi {
namespace {

// Sequences of every awkward length: none, within a page, a whole page, one more, several pages.
void TestGatheredPagesAreTheTokens() {
  constexpr uint64_t kPageTokens = 8;
  const std::vector<uint64_t> lengths = {3, 0, 8, 9, 0, 0, 24, 1};
  const test::TemporaryFolder folder;
  BufferWriter::Create(
      folder / "b",
      {.capacity_tokens = 100, .max_trajectories = lengths.size(), .page_tokens = kPageTokens});
  BufferWriter writer(folder / "b");
  std::vector<std::byte> pages;
  std::vector<int32_t> first_pages, cu_seqlens = {0};
  std::vector<Record> records;
  test::Tokens expected(0, 0, 0);
  for (const uint64_t length : lengths) {
    const int64_t id = writer.Begin(0, 0);
    test::AppendNext(writer, id, length);
    const test::Tokens tokens(id, 0, length);
    expected.ids.insert(expected.ids.end(), tokens.ids.begin(), tokens.ids.end());
    expected.logprobs.insert(expected.logprobs.end(), tokens.logprobs.begin(),
                             tokens.logprobs.end());
    expected.mask.insert(expected.mask.end(), tokens.mask.begin(), tokens.mask.end());
    const uint64_t bytes = writer.layout().PageBytes(), end = pages.size();
    first_pages.push_back(static_cast<int32_t>(end / bytes));
    cu_seqlens.push_back(static_cast<int32_t>(expected.ids.size()));
    pages.resize(end + writer.layout().TokenPages(length) * bytes);
    CHECK(writer.ReadPages(writer.Get(id), pages.data() + end, records));
  }
  const cuda::PagedSequences from{.pages = reinterpret_cast<const unsigned char*>(pages.data()),
                                  .page_tokens = kPageTokens,
                                  .first_pages = first_pages.data(),
                                  .cu_seqlens = cu_seqlens.data(),
                                  .sequences = static_cast<int32_t>(lengths.size())};
  test::Tokens got(1, 0, expected.ids.size());  // Other tokens, which are overwritten.
  for (int32_t token = 0; token < cu_seqlens.back(); ++token) {
    cuda::GatherToken(from, token, {got.ids.data(), got.logprobs.data(), got.mask.data()});
  }
  CHECK(got.ids == expected.ids);
  CHECK(got.logprobs == expected.logprobs);
  CHECK(got.mask == expected.mask);
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestGatheredPagesAreTheTokens();
  return kimi::test::Failures();
}
