#include "buffer/writer.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <stdexcept>

#include "base/shared.h"
#include "buffer/checksum.h"

namespace kimi {
namespace {

constexpr uint64_t kMostGrowth = 64 << 20;  // Bytes by which a file grows at a time.

std::string Number(uint64_t value) { return std::to_string(value); }

[[noreturn]] void Refuse(const std::string& why) { throw std::invalid_argument(why); }

std::string Name(EndReason reason) {
  return std::string("'") + kReasonNames[static_cast<size_t>(reason)] + "'";
}

// Returns the index of the first entry that is not finite, or n. Counting such entries compiles to
// vector instructions; the index is searched for only if the count is not 0.
size_t FirstNotFinite(const float* values, size_t n) {
  constexpr uint32_t kExponent = 0x7f800000;
  const auto is_bad = [](float value) {
    return (std::bit_cast<uint32_t>(value) & kExponent) == kExponent;
  };
  uint32_t bad = 0;
  for (size_t i = 0; i < n; ++i) bad += is_bad(values[i]);
  if (bad == 0) return n;
  return static_cast<size_t>(std::find_if(values, values + n, is_bad) - values);
}

}  // namespace

// Held during every change. It refuses a second thread instead of waiting for the first one.
class BufferWriter::WriteGuard {
 public:
  explicit WriteGuard(BufferWriter& writer) : writer_(writer) {
    if (writer_.busy_.exchange(true, std::memory_order_acquire)) {
      throw std::logic_error("Two threads write to " + writer_.path() +
                             " at once: write from one thread only, or use a lock");
    }
  }
  ~WriteGuard() { writer_.busy_.store(false, std::memory_order_release); }

  WriteGuard(const WriteGuard&) = delete;
  WriteGuard& operator=(const WriteGuard&) = delete;

 private:
  BufferWriter& writer_;
};

Header BufferWriter::HeaderOf(const BufferSizes& sizes) {
  if (sizes.capacity_tokens < 1 || sizes.max_trajectories < 1) {
    Refuse("A buffer of " + Number(sizes.capacity_tokens) + " tokens and " +
           Number(sizes.max_trajectories) +
           " trajectories is empty; both sizes must be at least 1");
  }
  if (sizes.page_tokens < kPageMultiple || sizes.page_tokens % kPageMultiple != 0 ||
      sizes.page_tokens > kMostPageTokens) {
    Refuse("page_tokens = " + Number(sizes.page_tokens) + ": it must be a multiple of " +
           Number(kPageMultiple) + ", from " + Number(kPageMultiple) + " to " +
           Number(kMostPageTokens));
  }
  const uint64_t pages = (sizes.capacity_tokens - 1) / sizes.page_tokens + 1;
  if (pages >= kMostCount || sizes.max_trajectories >= kMostCount) {
    Refuse("A buffer of " + Number(pages) + " pages and " + Number(sizes.max_trajectories) +
           " trajectories is too large: each must be below " + Number(kMostCount));
  }
  Header header{};
  std::copy(std::begin(kMagic), std::end(kMagic), header.magic);
  header.version = kFormatVersion;
  header.page_tokens = static_cast<uint32_t>(sizes.page_tokens);
  header.pages = static_cast<uint32_t>(pages);
  header.max_trajectories = static_cast<uint32_t>(sizes.max_trajectories);
  header.crc = HeaderCrc(header);
  return header;
}

void BufferWriter::Create(const std::string& path, const BufferSizes& sizes) {
  const Header header = HeaderOf(sizes);
  NewFile file(path, Layout(header).PagesAt());
  file.Write(0, &header, sizeof(header));
  file.Publish(NewFile::Existing::kRefuse);
}

BufferWriter::BufferWriter(const std::string& path)
    : BufferReader(path, MappedFile::Mode::kWrite),
      pages_allocated_(layout_.PagesIn(file_.SizeNow())),
      planned_(layout_.max_trajectories) {
  Recover();
}

int64_t BufferWriter::Begin(int64_t prompt_id, int64_t group_id) {
  const WriteGuard guard(*this);
  const uint64_t id = Unseal(header().next_id).value(), most = layout_.max_trajectories;
  const auto is_free = [&](uint64_t probe) {
    return Unseal(slot((id + probe) % most).generation).value() % 2 == 0;
  };
  uint64_t probe = 0;
  while (probe < most && !is_free(probe)) ++probe;
  if (probe == most) {
    Refuse("Cannot begin a trajectory: all " + Number(most) +
           " are in use; raise max_trajectories or evict finished ones");
  }
  // The slot is free, so no reader uses its fields until the generation is odd.
  Slot& at = mutable_slot((id + probe) % most);
  const uint64_t generation = Unseal(at.generation).value() + 1;
  const auto trajectory_id = static_cast<int64_t>(id);
  shared::Store(at.commit, Commit().Pack());
  shared::Store(at.trajectory_id, trajectory_id);
  shared::Store(at.prompt_id, prompt_id);
  shared::Store(at.group_id, group_id);
  shared::Store(at.lease, Seal(0));
  shared::Store(at.identity_crc, IdentityCrc(generation, trajectory_id, prompt_id, group_id));
  if (probe > Unseal(header().max_probe).value()) {
    shared::StoreRelease(mutable_header().max_probe, Seal(probe));
  }
  shared::StoreRelease(at.generation, Seal(generation));
  // Stored after the slot, so that a kill between the two stores does not skip an id.
  shared::StoreRelease(mutable_header().next_id, Seal(id + 1));
  return trajectory_id;
}

void BufferWriter::Append(std::span<const NewSegment> segments, uint64_t* lengths) {
  const WriteGuard guard(*this);
  ++calls_;
  infos_.clear();
  uint64_t pages = 0, tokens = 0;
  for (const NewSegment& segment : segments) {
    const TrajectoryInfo& info = infos_.emplace_back(Get(segment.trajectory_id));
    Commit& planned = PlannedFor(info);
    CheckSegment(segment, info, planned);
    pages -= layout_.PagesOf(planned.length, planned.segments);
    planned.length += static_cast<uint32_t>(segment.length);
    planned.segments += segment.length > 0;
    planned.reason = segment.reason;
    pages += layout_.PagesOf(planned.length, planned.segments);
    tokens += segment.length;
  }
  CheckRoom(pages, tokens);
  if (pages > free_pages_.size()) Grow(pages - free_pages_.size());
  for (size_t i = 0; i < segments.size(); ++i) lengths[i] = AppendOne(infos_[i], segments[i]);
}

Commit& BufferWriter::PlannedFor(const TrajectoryInfo& info) {
  Planned& planned = planned_[info.slot];
  if (planned.call != calls_) planned = {.call = calls_, .commit = info.commit};
  return planned.commit;
}

void BufferWriter::CheckSegment(const NewSegment& segment, const TrajectoryInfo& info,
                                const Commit& planned) const {
  const auto refuse = [&](const std::string& why) {
    Refuse("Cannot append to trajectory " + std::to_string(segment.trajectory_id) + ": " + why);
  };
  if (planned.reason != EndReason::kOpen) {
    refuse("it ended by " + Name(planned.reason));
  }
  if (segment.lease && *segment.lease != info.lease) {
    refuse("lease " + Number(*segment.lease) + " was given, but the newest lease is " +
           Number(info.lease) + ": another worker has resumed it");
  }
  const size_t bad = FirstNotFinite(segment.logprobs, segment.length);
  if (bad < segment.length) {
    refuse("log-prob " + Number(bad) + " of the segment is " +
           std::to_string(segment.logprobs[bad]) + "; the engine's weights or logits are broken");
  }
  if (segment.length > layout_.MaxLength() - planned.length) {
    refuse("it has " + Number(planned.length) + " tokens, and " + Number(segment.length) +
           " more exceed the " + Number(layout_.MaxLength()) +
           " that a slot can list; raise page_tokens");
  }
  if (segment.length > 0 && planned.segments >= layout_.MaxSegments()) {
    refuse("it has " + Number(planned.segments) +
           " segments, the most that a slot can list; append more tokens per call");
  }
}

void BufferWriter::CheckRoom(uint64_t pages, uint64_t tokens) const {
  if (pages <= PagesFree()) return;
  Refuse("Cannot append " + Number(tokens) + " tokens: they take " + Number(pages) + " pages of " +
         Number(layout_.page_tokens) + " tokens, and " + Number(PagesFree()) + " of " +
         Number(layout_.pages) + " are free; raise capacity_tokens or evict finished trajectories");
}

// Makes the file longer by at least `missing` pages. It grows by a quarter, so that a small file
// stays small, and by at most 64 MiB, so that no append waits long.
// REQUIRES: the header allows `missing` more pages.
void BufferWriter::Grow(uint64_t missing) {
  const uint64_t most = kMostGrowth / layout_.PageBytes(), left = layout_.pages - pages_allocated_;
  const uint64_t more = std::min(left, std::max(missing, std::min(pages_allocated_ / 4, most)));
  free_pages_.reserve(free_pages_.size() + more);  // May throw, so it comes first.
  file_.Grow(layout_.BytesWith(pages_allocated_), layout_.BytesWith(pages_allocated_ + more));
  pages_allocated_ += more;
  for (uint64_t i = 1; i <= more; ++i) {
    free_pages_.push_back(static_cast<uint32_t>(pages_allocated_ - i));
  }
}

// REQUIRES: the segment was checked, and enough pages are free.
uint64_t BufferWriter::AppendOne(const TrajectoryInfo& info, const NewSegment& segment) {
  Slot& at = mutable_slot(info.slot);
  Commit commit = Commit::Unpack(at.commit).value();
  if (segment.length > 0) {
    Record record{.start = commit.length,
                  .length = static_cast<uint32_t>(segment.length),
                  .policy_version = segment.policy_version,
                  .crc = 0};
    SegmentCrc crc(info.trajectory_id, info.generation, record);
    crc.Add(segment.token_ids, segment.logprobs, segment.mask, segment.length);
    record.crc = crc.value();
    CopyTokens(at, commit.length, segment);
    PutRecord(at, commit.segments, record);
    commit.length += record.length;
    ++commit.segments;
  }
  commit.reason = segment.reason;
  shared::StoreRelease(at.commit, commit.Pack());  // The acknowledgement.
  return commit.length;
}

void BufferWriter::CopyTokens(Slot& at, uint64_t start, const NewSegment& segment) {
  const uint64_t per_page = layout_.page_tokens;
  for (uint64_t done = 0, n; done < segment.length; done += n) {
    const uint64_t position = start + done, offset = position % per_page;
    n = std::min(per_page - offset, segment.length - done);
    if (offset == 0) SetPage(at.token_pages, position / per_page, TakePage());
    std::byte* to = page(PageAt(at.token_pages, position / per_page));
    shared::CopyIn(to + 4 * offset, segment.token_ids + done, 4 * n);
    shared::CopyIn(to + 4 * (per_page + offset), segment.logprobs + done, 4 * n);
    shared::CopyIn(to + 8 * per_page + offset, segment.mask + done, n);
  }
}

void BufferWriter::PutRecord(Slot& at, uint32_t index, const Record& record) {
  void* to = nullptr;
  if (index < kInlineRecords) {
    to = &at.records[index];
  } else {
    const uint64_t entry = index - kInlineRecords, per_page = layout_.RecordsPerPage();
    if (entry % per_page == 0) SetPage(at.record_pages, entry / per_page, TakePage());
    to = page(PageAt(at.record_pages, entry / per_page)) + entry % per_page * sizeof(record);
  }
  shared::CopyIn(to, &record, sizeof(record));
}

// Entries are set in order, each when the first byte of its page is written. An append that was
// never committed may have left an entry; the next append overwrites it.
template <typename Table>
void BufferWriter::SetPage(Table& table, uint64_t ordinal, uint32_t number) {
  if (ordinal < Table::kDirectEntries) {
    shared::Store(table.direct[ordinal], number);
    return;
  }
  const uint64_t entry = ordinal - Table::kDirectEntries, per_page = layout_.EntriesPerPage();
  uint32_t& root = table.roots[entry / per_page];
  if (entry % per_page == 0) shared::Store(root, TakePage());
  shared::Store(reinterpret_cast<shared::Half*>(page(root))[entry % per_page], number);
}

uint32_t BufferWriter::TakePage() {
  assert(!free_pages_.empty());
  const uint32_t number = free_pages_.back();
  free_pages_.pop_back();
  return number;
}

void BufferWriter::Finish(int64_t trajectory_id, EndReason reason) {
  const WriteGuard guard(*this);
  const TrajectoryInfo info = Get(trajectory_id);
  Commit commit = info.commit;
  if (commit.reason != EndReason::kOpen) {
    Refuse("Trajectory " + std::to_string(trajectory_id) + " has ended already, by " +
           Name(commit.reason));
  }
  commit.reason = reason;
  shared::StoreRelease(mutable_slot(info.slot).commit, commit.Pack());
}

uint64_t BufferWriter::Resume(int64_t trajectory_id) {
  const WriteGuard guard(*this);
  const TrajectoryInfo info = Get(trajectory_id);
  if (info.commit.reason != EndReason::kOpen) {
    Refuse("Cannot resume trajectory " + std::to_string(trajectory_id) + ": it ended by " +
           Name(info.commit.reason));
  }
  shared::StoreRelease(mutable_slot(info.slot).lease, Seal(info.lease + 1));
  return info.lease + 1;
}

void BufferWriter::Evict(std::span<const int64_t> trajectory_ids) {
  const WriteGuard guard(*this);
  for (const int64_t id : trajectory_ids) Get(id);  // All must exist before the first is removed.
  const auto former = static_cast<std::ptrdiff_t>(free_pages_.size());
  for (const int64_t id : trajectory_ids) {
    if (const auto info = Find(id)) EvictOne(*info);  // An id may occur twice.
  }
  // Appends then take them in the order of their addresses, which is a quarter faster.
  std::sort(free_pages_.begin() + former, free_pages_.end(), std::greater<>());
}

void BufferWriter::EvictOne(const TrajectoryInfo& info) {
  const Slot& at = slot(info.slot);
  shared::StoreRelease(mutable_slot(info.slot).generation, Seal(info.generation + 1));
  // Comes before any store into the pages, which the next append may reuse; see IsCurrent.
  std::atomic_thread_fence(std::memory_order_release);
  VisitPages(at, info.commit, [this](uint32_t number) { free_pages_.push_back(number); });
}

void BufferWriter::SetMark(uint64_t mark) {
  const WriteGuard guard(*this);
  if (mark >> kSealedBits) Refuse("mark = " + Number(mark) + ": it must be below 2^56");
  shared::StoreRelease(mutable_header().mark, Seal(mark));
}

void BufferWriter::Snapshot(const std::string& path) {
  const WriteGuard guard(*this);
  std::vector<bool> is_free(pages_allocated_, false);
  for (const uint32_t number : free_pages_) is_free[number] = true;
  uint64_t end = pages_allocated_;
  while (end > 0 && is_free[end - 1] && header().version > kWholeVersion) --end;
  NewFile file(path, layout_.BytesWith(end));
  file.Write(0, file_.data(), layout_.PagesAt());
  for (uint64_t first = 0; first < end;) {
    uint64_t last = first;  // The end of a run of pages in use.
    while (last < end && !is_free[last]) ++last;
    const uint64_t from = layout_.BytesWith(first);
    file.Write(from, file_.data() + from, (last - first) * layout_.PageBytes());
    first = last + 1;
  }
  file.Publish(NewFile::Existing::kReplace);
}

}  // namespace kimi
