// The buffer's file takes disk space as it needs it. Readers follow, and a full disk is an error
// before anything is appended.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "buffer/writer.h"
#include "buffer_testing.h"
#include "check.h"

namespace kimi {
namespace {

using test::AppendNext;
using test::IsSound;
using test::MessageOf;

constexpr uint64_t kPages = 1000;
constexpr BufferSizes kSizes{
    .capacity_tokens = 64 * kPages, .max_trajectories = 8, .page_tokens = 64};

void TestTheFileGrowsByAQuarterAndReusesPagesFirst() {
  const test::TemporaryFolder folder;
  const std::string path = folder / "b";
  BufferWriter::Create(path, kSizes);
  BufferWriter writer(path);
  const Layout& layout = writer.layout();
  CHECK_EQ(std::filesystem::file_size(path), layout.PagesAt());  // No page yet.
  const int64_t id = writer.Begin(0, 0);
  uint64_t expected = 0;
  for (uint64_t segments = 1; segments <= 30; ++segments) {
    AppendNext(writer, id, 64);
    const uint64_t used = layout.PagesOf(64 * segments, segments);
    if (used > expected) expected += std::max(used - expected, expected / 4);
    CHECK_EQ(writer.Stats().pages_allocated, expected);
    CHECK_EQ(writer.Stats().pages_free, kPages - used);
    CHECK_EQ(std::filesystem::file_size(path), layout.BytesWith(expected));
  }
  writer.Evict({{id}});
  AppendNext(writer, writer.Begin(0, 0), 30 * 64);
  CHECK_EQ(writer.Stats().pages_allocated, expected);
  AppendNext(writer, 1, 200 * 64);  // More than a quarter: as much as it takes, with its 2 lists.
  CHECK_EQ(writer.Stats().pages_allocated, layout.PagesOf(230 * 64, 2));
  CHECK(IsSound(writer, writer.Get(1)));
}

void TestPagesAllocatedAreReusedAfterReopening() {
  const test::TemporaryFolder folder;
  const std::string path = folder / "b";
  BufferWriter::Create(path, kSizes);
  uint64_t size = 0;
  {
    BufferWriter writer(path);
    for (int i = 0; i < 4; ++i) AppendNext(writer, writer.Begin(0, 0), 1000);
    writer.Evict({{0, 2}});
    size = std::filesystem::file_size(path);
  }
  BufferWriter writer(path);
  CHECK_EQ(std::filesystem::file_size(path), size);
  for (int i = 0; i < 2; ++i) AppendNext(writer, writer.Begin(0, 0), 1000);
  CHECK_EQ(std::filesystem::file_size(path), size);
  for (const auto& info : writer.Scan()) CHECK(IsSound(writer, info));
}

// A mapping that is older than the pages it reads.
void TestReadersFollowAGrowingFile() {
  const test::TemporaryFolder folder;
  BufferWriter::Create(folder / "b", kSizes);
  BufferWriter writer(folder / "b");
  const BufferReader early(folder / "b");
  std::atomic<bool> done = false;
  std::thread reading([&] {
    uint64_t seen = 0;
    while (!done || seen < 8) {
      seen = 0;
      for (const TrajectoryInfo& info : early.Scan()) {
        CHECK(IsSound(early, info));
        ++seen;
      }
    }
  });
  for (int64_t id = 0; id < 8; ++id) writer.Begin(0, 0);
  for (uint64_t step = 0; step < 100; ++step) {
    for (int64_t id = 0; id < 8; ++id) AppendNext(writer, id, 71);
  }
  done = true;
  reading.join();
  CHECK_EQ(early.Stats().pages_allocated, writer.Stats().pages_allocated);
}

// A limit on the size of files stands for a full disk.
void TestAFullDiskIsAnErrorBeforeAnythingIsAppended() {
  const test::TemporaryFolder folder;
  const std::string path = folder / "b";
  BufferWriter::Create(path, kSizes);
  BufferWriter writer(path);
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit former;
  CHECK_EQ(getrlimit(RLIMIT_FSIZE, &former), 0);
  rlimit low = former;
  low.rlim_cur = 64 << 10;
  CHECK_EQ(setrlimit(RLIMIT_FSIZE, &low), 0);
  const int64_t id = writer.Begin(0, 0);
  std::string message;
  while (message.empty()) {
    try {
      AppendNext(writer, id, 100);
    } catch (const std::system_error& error) {
      message = error.what();
    }
  }
  const uint64_t length = writer.Get(id).commit.length, size = std::filesystem::file_size(path);
  CHECK(length >= 4000 && size <= low.rlim_cur);
  CHECK(message.starts_with("Cannot allocate bytes " + std::to_string(size) + " to "));
  CHECK(message.find(" bytes are free on the disk: free some, or use a larger disk) for " + path) !=
        std::string::npos);
  CHECK(IsSound(writer, writer.Get(id)));
  CHECK_EQ(MessageOf<std::system_error>([&] { AppendNext(writer, id, 100); }), message);
  CHECK_EQ(std::filesystem::file_size(path), size);
  CHECK_EQ(setrlimit(RLIMIT_FSIZE, &former), 0);
  CHECK_EQ(AppendNext(writer, id, 100), length + 100);
  CHECK(IsSound(writer, writer.Get(id)));
}

}  // namespace
}  // namespace kimi

int main() {
  kimi::TestTheFileGrowsByAQuarterAndReusesPagesFirst();
  kimi::TestPagesAllocatedAreReusedAfterReopening();
  kimi::TestReadersFollowAGrowingFile();
  kimi::TestAFullDiskIsAnErrorBeforeAnythingIsAppended();
  return kimi::test::Failures();
}
