// BufferReader reads a buffer file, which one writer process may be changing at the same time.
//
// It takes no lock and writes nothing. It copies a trajectory, compares the checksum of each
// segment, and drops the copy if the generation of the slot has changed meanwhile, because the
// trajectory was then evicted and its pages may have been reused.
//
// While the writer extends a trajectory, a reader sees the length that was committed when it
// looked. Tokens below that length never change.
//
// The file may grow at any time. A reader has reserved addresses for the greatest size, so it reads
// new pages where it expects them. It uses no page number past the end of the file.
//
// Synchronisation: none needed. Any number of threads and processes may read during writes.
#ifndef KIMI_BUFFER_READER_H_
#define KIMI_BUFFER_READER_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "base/shared.h"
#include "buffer/format.h"

namespace kimi {

// There is no such trajectory.
class NotFound : public std::runtime_error {
 public:
  explicit NotFound(int64_t trajectory_id);
};

// The state of a trajectory at the time of a look-up. It also serves as the key for reading it.
struct TrajectoryInfo {
  uint32_t slot;
  uint64_t generation;
  int64_t trajectory_id;
  int64_t prompt_id;
  int64_t group_id;
  uint64_t lease;
  Commit commit;
};

// Arrays for a copy of a trajectory, each with `commit.length` entries.
struct Destination {
  int32_t* token_ids;
  float* logprobs;
  uint8_t* mask;
  int32_t* policy_versions;
};

struct BufferStats {
  uint64_t trajectories = 0;
  uint64_t unfinished = 0;
  uint64_t tokens = 0;
  uint64_t segments = 0;
  uint64_t pages = 0;
  uint64_t pages_free = 0;
  uint64_t pages_allocated = 0;                   // In the file at present; it grows up to `pages`.
  std::map<int32_t, uint64_t> tokens_by_version;  // Sampled tokens only: versions from 0 on.
};

class BufferReader {
 public:
  // Throws std::system_error if the file cannot be opened. Throws std::invalid_argument if it is
  // not a buffer, is cut off, or has a newer format.
  explicit BufferReader(const std::string& path) : BufferReader(path, MappedFile::Mode::kRead) {}
  virtual ~BufferReader() = default;

  BufferReader(const BufferReader&) = delete;
  BufferReader& operator=(const BufferReader&) = delete;

  const Layout& layout() const { return layout_; }
  const std::string& path() const { return file_.path(); }

  std::optional<TrajectoryInfo> Find(int64_t trajectory_id) const;
  // As Find, but throws NotFound if there is no such trajectory.
  TrajectoryInfo Get(int64_t trajectory_id) const;
  // All trajectories, oldest first.
  std::vector<TrajectoryInfo> Scan() const;

  // Copies tokens [0, info.commit.length). Returns false if the trajectory was evicted; the copy is
  // then invalid. Throws std::invalid_argument if the file is damaged.
  bool Read(const TrajectoryInfo& info, const Destination& to) const;

  // Copies the segment records, in order. Returns and throws as Read.
  bool ReadRecords(const TrajectoryInfo& info, std::vector<Record>& records) const;

  // Copies the segment records and the pages of tokens, each page as a whole and one after another.
  // Returns and throws as Read.
  // REQUIRES: `pages` holds at least layout().TokenPages(info.commit.length) pages.
  bool ReadPages(const TrajectoryInfo& info, std::byte* pages, std::vector<Record>& records) const;

  // Whether the trajectory has not been evicted since `info` was made.
  bool IsCurrent(const TrajectoryInfo& info) const;

  // Counts from the slots and the segment records; reads no token.
  BufferStats Stats() const;
  uint64_t mark() const;

 protected:
  BufferReader(const std::string& path, MappedFile::Mode mode);

  const Header& header() const { return *reinterpret_cast<const Header*>(file_.data()); }
  const Slot& slot(uint64_t index) const {
    return reinterpret_cast<const Slot*>(file_.data() + layout_.SlotsAt())[index];
  }
  std::byte* page(uint32_t number) const {
    return file_.data() + layout_.PagesAt() + number * layout_.PageBytes();
  }
  // Whether the file has this page. A look at the size of the file is needed only if it has grown.
  bool HasPage(uint32_t number) const {
    return number < pages_seen_.load(std::memory_order_relaxed) || HasPageNow(number);
  }
  // The number of page `ordinal` of a table, or kNoPage if the entry is torn or damaged.
  template <typename Table>
  uint32_t PageAt(const Table& table, uint64_t ordinal) const;

  // Calls visit(number) for each page, of any kind, of a trajectory with this commit.
  template <typename Visit>
  void VisitPages(const Slot& at, const Commit& commit, Visit visit) const;

  std::optional<TrajectoryInfo> Look(uint64_t index) const;
  // Record `index` of a slot, or nothing if its page number is invalid.
  std::optional<Record> RecordAt(const Slot& slot, uint32_t index) const;

  MappedFile file_;
  const Layout layout_;

 private:
  bool HasPageNow(uint32_t number) const;
  [[noreturn]] void ThrowDamaged(const TrajectoryInfo& info, uint64_t from) const;

  mutable std::atomic<uint64_t> pages_seen_ = 0;  // At the last look at the file's size.
};

template <typename Visit>
void BufferReader::VisitPages(const Slot& at, const Commit& commit, Visit visit) const {
  const auto visit_table = [&](const auto& table, uint64_t listed) {
    for (uint64_t i = 0; i < listed; ++i) visit(PageAt(table, i));
    for (uint64_t i = 0; i < layout_.IndexPages(table, listed); ++i) {
      visit(shared::Load(table.roots[i]));
    }
  };
  visit_table(at.token_pages, layout_.TokenPages(commit.length));
  visit_table(at.record_pages, layout_.RecordPages(commit.segments));
}

template <typename Table>
uint32_t BufferReader::PageAt(const Table& table, uint64_t ordinal) const {
  uint32_t number;
  if (ordinal < Table::kDirectEntries) {
    number = shared::Load(table.direct[ordinal]);
  } else {
    const uint64_t entry = ordinal - Table::kDirectEntries, per_page = layout_.EntriesPerPage();
    if (entry / per_page >= Table::kRootEntries) return kNoPage;
    const uint32_t root = shared::Load(table.roots[entry / per_page]);
    if (!HasPage(root)) return kNoPage;
    number = shared::Load(reinterpret_cast<const shared::Half*>(page(root))[entry % per_page]);
  }
  return HasPage(number) ? number : kNoPage;
}

}  // namespace kimi

#endif  // KIMI_BUFFER_READER_H_
