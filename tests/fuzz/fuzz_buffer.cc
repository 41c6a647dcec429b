// Opens damaged buffer files: readers and recovery refuse them or keep intact prefixes only.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "../cpp/buffer_testing.h"
#include "../cpp/files.h"
#include "buffer/writer.h"
#include "damaged_file.h"

namespace kimi::fuzz {
namespace {

// Trajectories of many segments, of pages that list pages, evicted ones, and an open one.
std::string SoundFile(const std::string& path) {
  std::filesystem::remove(path);
  BufferWriter::Create(path, {.capacity_tokens = 3000, .max_trajectories = 6, .page_tokens = 8});
  {
    BufferWriter writer(path);
    for (int64_t id = 0; id < 4; ++id) {
      writer.Begin(id, id);
      for (int i = 0; i < 8 << id; ++i) test::AppendNext(writer, id, 7);
      if (id < 3) writer.Finish(id, EndReason::kStop);
    }
    const std::vector<int64_t> gone = {1};
    writer.Evict(gone);
    writer.SetMark(5);
  }
  return test::Contents(path);
}

void ReadAll(const BufferReader& buffer, bool must_be_sound) {
  buffer.Stats();
  for (const TrajectoryInfo& info : buffer.Scan()) {
    Require(info.commit.length <= buffer.layout().MaxLength());
    try {
      if (must_be_sound) {
        Require(test::IsSound(buffer, info));
      } else {
        test::CopyOf(buffer, info);
      }
      std::vector<Record> records;
      buffer.ReadRecords(info, records);
    } catch (const std::invalid_argument&) {
      Require(!must_be_sound);
    }
  }
}

// What an owner does with an opened buffer: nothing of it may break the file.
void Use(BufferWriter& writer) {
  const auto all = writer.Scan();
  for (const TrajectoryInfo& info : all) {
    if (info.commit.reason == EndReason::kOpen) test::AppendNext(writer, info.trajectory_id, 9);
  }
  if (!all.empty()) writer.Evict(std::vector<int64_t>{all.front().trajectory_id});
  test::AppendNext(writer, writer.Begin(1, 1), 20);
}

}  // namespace
}  // namespace kimi::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kimi;
  static const std::string path = fuzz::PathFor("buffer");
  static const std::string sound = fuzz::SoundFile(path);
  const fuzz::Damaged damaged = fuzz::Damage(sound, data, size, offsetof(Header, crc));
  test::SetContents(path, damaged.contents);
  try {
    fuzz::ReadAll(BufferReader(path), false);
    {
      BufferWriter writer(path);
      fuzz::ReadAll(writer, !damaged.resealed);
    }
    BufferWriter again(path);  // Recovery has left nothing for a second one.
    fuzz::Require(again.recovery().cuts.empty() && again.recovery().slots_lost == 0);
    fuzz::Use(again);
    fuzz::ReadAll(again, !damaged.resealed);
  } catch (const std::invalid_argument&) {  // Refused.
  } catch (const std::system_error&) {
  } catch (const NotFound&) {
  }
  return 0;
}
