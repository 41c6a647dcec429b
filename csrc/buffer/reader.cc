#include "buffer/reader.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/shared.h"
#include "buffer/checksum.h"

namespace kimi {
namespace {

[[noreturn]] void Refuse(const std::string& path, const std::string& why) {
  throw std::invalid_argument(path + " " + why);
}

// Returns the header of `file`, after checking everything in it that never changes.
const Header& CheckedHeader(const MappedFile& file) {
  const std::string& path = file.path();
  if (file.size() < sizeof(Header) || std::memcmp(file.data(), kMagic, sizeof(kMagic)) != 0) {
    Refuse(path, "is not a rollout buffer: it does not begin with KIMIROLL");
  }
  const auto& header = *reinterpret_cast<const Header*>(file.data());
  if (header.version > kFormatVersion) {
    Refuse(path, "has format version " + std::to_string(header.version) + ", and this kimi_core " +
                     "reads up to " + std::to_string(kFormatVersion) +
                     ": open it with the kimi_core that wrote it, or a newer one");
  }
  const Layout layout(header);
  const uint64_t least = header.version <= kWholeVersion ? layout.MostBytes() : layout.PagesAt();
  if (header.crc != HeaderCrc(header)) {
    Refuse(path, "has a damaged header (its checksum is wrong): restore a snapshot");
  }
  if (!HasPossibleSizes(header)) {
    Refuse(path, "has a damaged header (no buffer has its sizes): restore a snapshot");
  }
  if (file.size() < least) {
    Refuse(path, "is cut off: it has " + std::to_string(file.size()) + " of " +
                     std::to_string(least) + " bytes; restore a snapshot");
  }
  for (const uint64_t* word : {&header.next_id, &header.mark, &header.max_probe}) {
    if (!Unseal(shared::Load(*word))) {
      Refuse(path, "has a damaged header (a counter's check byte is wrong): restore a snapshot");
    }
  }
  return header;
}

}  // namespace

NotFound::NotFound(int64_t trajectory_id)
    : std::runtime_error("No trajectory " + std::to_string(trajectory_id) +
                         ": never begun, or evicted") {}

BufferReader::BufferReader(const std::string& path, MappedFile::Mode mode)
    : file_(path, mode), layout_(CheckedHeader(file_)) {
  file_.Reserve(layout_.MostBytes());
}

bool BufferReader::HasPageNow(uint32_t number) const {
  if (number >= layout_.pages) return false;
  const uint64_t pages = layout_.PagesIn(file_.SizeNow());
  pages_seen_.store(pages, std::memory_order_relaxed);
  return number < pages;
}

// Reads the fields of a slot between two looks at its generation.
std::optional<TrajectoryInfo> BufferReader::Look(uint64_t index) const {
  const Slot& at = slot(index);
  const auto generation = Unseal(shared::LoadAcquire(at.generation));
  if (!generation || *generation % 2 == 0) return std::nullopt;
  const auto commit = Commit::Unpack(shared::LoadAcquire(at.commit));
  TrajectoryInfo info{.slot = static_cast<uint32_t>(index),
                      .generation = *generation,
                      .trajectory_id = shared::Load(at.trajectory_id),
                      .prompt_id = shared::Load(at.prompt_id),
                      .group_id = shared::Load(at.group_id),
                      .lease = Unseal(shared::Load(at.lease)).value_or(0),
                      .commit = commit.value_or(Commit{})};
  const uint32_t crc = shared::Load(at.identity_crc);
  if (!IsCurrent(info)) return std::nullopt;
  if (!commit ||
      crc != IdentityCrc(info.generation, info.trajectory_id, info.prompt_id, info.group_id)) {
    ThrowDamaged(info, 0);
  }
  return info;
}

bool BufferReader::IsCurrent(const TrajectoryInfo& info) const {
  // Pairs with the fence in EvictOne: who saw a reused page sees the new generation here.
  std::atomic_thread_fence(std::memory_order_acquire);
  return shared::Load(slot(info.slot).generation) == Seal(info.generation);
}

std::optional<TrajectoryInfo> BufferReader::Find(int64_t trajectory_id) const {
  if (trajectory_id < 0) return std::nullopt;
  const uint64_t home = static_cast<uint64_t>(trajectory_id) % layout_.max_trajectories;
  const uint64_t furthest = Unseal(shared::LoadAcquire(header().max_probe)).value_or(0);
  for (uint64_t probe = 0; probe <= furthest && probe < layout_.max_trajectories; ++probe) {
    const uint64_t index = (home + probe) % layout_.max_trajectories;
    // The id is the cheaper test, but only a hint until Look has checked the slot.
    if (shared::Load(slot(index).trajectory_id) != trajectory_id) continue;
    const auto info = Look(index);
    if (info && info->trajectory_id == trajectory_id) return info;
  }
  return std::nullopt;
}

TrajectoryInfo BufferReader::Get(int64_t trajectory_id) const {
  const auto info = Find(trajectory_id);
  if (!info) throw NotFound(trajectory_id);
  return *info;
}

std::vector<TrajectoryInfo> BufferReader::Scan() const {
  std::vector<TrajectoryInfo> found;
  for (uint64_t index = 0; index < layout_.max_trajectories; ++index) {
    if (const auto info = Look(index)) found.push_back(*info);
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.trajectory_id < b.trajectory_id; });
  return found;
}

std::optional<Record> BufferReader::RecordAt(const Slot& at, uint32_t index) const {
  const void* record = nullptr;
  if (index < kInlineRecords) {
    record = &at.records[index];
  } else {
    const uint64_t entry = index - kInlineRecords, per_page = layout_.RecordsPerPage();
    const uint32_t number = PageAt(at.record_pages, entry / per_page);
    if (number == kNoPage) return std::nullopt;
    record = page(number) + entry % per_page * sizeof(Record);
  }
  Record copy;
  shared::CopyOut(&copy, record, sizeof(copy));
  return copy;
}

bool BufferReader::ReadRecords(const TrajectoryInfo& info, std::vector<Record>& records) const {
  records.clear();
  records.reserve(info.commit.segments);
  uint64_t end = 0;
  for (uint32_t i = 0; i < info.commit.segments; ++i) {
    const auto record = RecordAt(slot(info.slot), i);
    if (!record || record->start != end || record->length > info.commit.length - end) break;
    end += record->length;
    records.push_back(*record);
  }
  if (!IsCurrent(info)) return false;
  if (end != info.commit.length || records.size() != info.commit.segments) ThrowDamaged(info, end);
  return true;
}

bool BufferReader::Read(const TrajectoryInfo& info, const Destination& to) const {
  // Kept for each thread: most trajectories have few segments, and allocating takes longer.
  thread_local std::vector<Record> records;
  if (!ReadRecords(info, records)) return false;

  const uint64_t length = info.commit.length, per_page = layout_.page_tokens;
  uint64_t done = 0;
  for (uint64_t n; done < length; done += n) {
    n = std::min(per_page, length - done);
    const uint32_t number = PageAt(slot(info.slot).token_pages, done / per_page);
    if (number == kNoPage) break;
    const std::byte* at = page(number);
    shared::CopyOut(to.token_ids + done, at, 4 * n);
    shared::CopyOut(to.logprobs + done, at + 4 * per_page, 4 * n);
    shared::CopyOut(to.mask + done, at + 8 * per_page, n);
  }
  if (!IsCurrent(info)) return false;
  if (done < length) ThrowDamaged(info, done);

  for (const Record& record : records) {
    SegmentCrc crc(info.trajectory_id, info.generation, record);
    const uint64_t start = record.start;
    crc.Add(to.token_ids + start, to.logprobs + start, to.mask + start, record.length);
    if (crc.value() != record.crc) ThrowDamaged(info, start);
    std::fill_n(to.policy_versions + start, record.length, record.policy_version);
  }
  return true;
}

bool BufferReader::ReadPages(const TrajectoryInfo& info, std::byte* pages,
                             std::vector<Record>& records) const {
  if (!ReadRecords(info, records)) return false;
  const uint64_t count = layout_.TokenPages(info.commit.length), bytes = layout_.PageBytes();
  uint64_t copied = 0;
  for (; copied < count; ++copied) {
    const uint32_t number = PageAt(slot(info.slot).token_pages, copied);
    if (number == kNoPage) break;
    shared::CopyOut(pages + copied * bytes, page(number), bytes);
  }
  if (!IsCurrent(info)) return false;
  const auto page_of = [&](uint64_t k) { return k < copied ? pages + k * bytes : nullptr; };
  for (const Record& record : records) {
    if (!HasItsCrc(info.trajectory_id, info.generation, record, layout_.page_tokens, page_of)) {
      ThrowDamaged(info, record.start);
    }
  }
  return true;
}

BufferStats BufferReader::Stats() const {
  BufferStats stats;
  stats.pages = stats.pages_free = layout_.pages;
  stats.pages_allocated = layout_.PagesIn(file_.SizeNow());
  std::vector<Record> records;
  for (const TrajectoryInfo& info : Scan()) {
    if (!ReadRecords(info, records)) continue;  // It was evicted meanwhile.
    ++stats.trajectories;
    stats.unfinished += info.commit.reason == EndReason::kOpen;
    stats.tokens += info.commit.length;
    stats.segments += info.commit.segments;
    stats.pages_free -= layout_.PagesOf(info.commit.length, info.commit.segments);
    for (const Record& record : records) {
      if (record.policy_version >= 0) {
        stats.tokens_by_version[record.policy_version] += record.length;
      }
    }
  }
  return stats;
}

uint64_t BufferReader::mark() const { return Unseal(shared::LoadAcquire(header().mark)).value(); }

void BufferReader::ThrowDamaged(const TrajectoryInfo& info, uint64_t from) const {
  Refuse(path(), "is damaged: trajectory " + std::to_string(info.trajectory_id) +
                     " fails its checksum from token " + std::to_string(from) +
                     "; open the file for writing, which cuts the trajectory there, or restore a "
                     "snapshot");
}

}  // namespace kimi
