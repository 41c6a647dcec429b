// BufferReader looks into a buffer file that one writer process may be changing at the same time.
//
// It takes no lock and writes nothing. What it returns is consistent: a trajectory is copied out,
// and if its slot's generation has changed meanwhile (it was evicted, its pages perhaps reused),
// the copy is dropped. What it returns is also sound: each segment's checksum is compared.
//
// Of a trajectory that the writer is extending a reader sees the length that was committed when it
// looked; the tokens below that length never change.
//
// Synchronisation: none needed. Any number of threads and processes may read beside one writer.
#ifndef KIMI_BUFFER_READER_H_
#define KIMI_BUFFER_READER_H_

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
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

// What a trajectory was when somebody looked; also the key to read it by.
struct TrajectoryInfo {
  uint32_t slot;
  uint64_t generation;
  int64_t trajectory_id;
  int64_t prompt_id;
  int64_t group_id;
  uint64_t lease;
  Commit commit;
};

// Where to copy a trajectory: `commit.length` entries each.
struct Destination {
  int32_t* token_ids;
  float* logprobs;
  uint8_t* mask;
  int32_t* policy_versions;
};

// Tokens of one segment as they lie in one page. They stand as long as IsCurrent(info).
struct SegmentPart {
  const int32_t* token_ids;
  const float* logprobs;
  const uint8_t* mask;
  size_t length;
};

struct BufferStats {
  uint64_t trajectories = 0;
  uint64_t unfinished = 0;
  uint64_t tokens = 0;
  uint64_t segments = 0;
  uint64_t pages = 0;
  uint64_t pages_free = 0;
  std::map<int32_t, uint64_t> tokens_by_version;  // Of what policies sampled: version >= 0.
};

class BufferReader {
 public:
  // Throws std::system_error where the file cannot be opened and std::invalid_argument where it is
  // no buffer, of a newer format, or cut off.
  explicit BufferReader(const std::string& path) : BufferReader(path, MappedFile::Mode::kRead) {}
  virtual ~BufferReader() = default;

  BufferReader(const BufferReader&) = delete;
  BufferReader& operator=(const BufferReader&) = delete;

  const Layout& layout() const { return layout_; }
  const std::string& path() const { return file_.path(); }

  std::optional<TrajectoryInfo> Find(int64_t trajectory_id) const;
  // Find, or throws NotFound.
  TrajectoryInfo Get(int64_t trajectory_id) const;
  // Every trajectory, oldest first.
  std::vector<TrajectoryInfo> Scan() const;

  // Copies tokens [0, info.commit.length). False: it has been evicted, and the copy is rubbish.
  // Throws std::invalid_argument where the file is damaged.
  bool Read(const TrajectoryInfo& info, const Destination& to) const;

  // Its segments, in order. False and throws as Read.
  bool ReadRecords(const TrajectoryInfo& info, std::vector<Record>& records) const;

  // Where segment `record` of it lies. False as Read.
  bool Locate(const TrajectoryInfo& info, const Record& record,
              std::vector<SegmentPart>& parts) const;

  // Whether it still is what `info` says, but for what was appended.
  bool IsCurrent(const TrajectoryInfo& info) const;

  BufferStats Stats() const;
  uint64_t mark() const;

  // Draws up to `count` different prompts of 0 .. max_prompts - 1, each in proportion to
  // max(1 - rate, floor); see DrawDistinct. A prompt's rate is its own, mixed with `prior_weight`
  // responses' worth of the rate of all, so that one that was never tried counts as an average one.
  // REQUIRES: 0 < floor <= 1 and prior_weight > 0.
  std::vector<int64_t> DrawPrompts(size_t count, uint64_t seed, double floor,
                                   double prior_weight) const;

  // Responses counted for a prompt, and the sum of their correctness.
  // REQUIRES: prompt < layout().max_prompts.
  std::pair<uint32_t, float> PromptCounts(uint64_t prompt) const;

 protected:
  BufferReader(const std::string& path, MappedFile::Mode mode);

  const Header& header() const { return *reinterpret_cast<const Header*>(file_.data()); }
  const Slot& slot(uint64_t index) const {
    return reinterpret_cast<const Slot*>(file_.data() + layout_.SlotsAt())[index];
  }
  const uint64_t& prompt_word(uint64_t prompt) const {
    return reinterpret_cast<const uint64_t*>(file_.data() + layout_.PromptsAt())[prompt];
  }
  std::byte* page(uint32_t number) const {
    return file_.data() + layout_.PagesAt() + number * layout_.PageBytes();
  }
  // Page number `ordinal` of a table; kNoPage where that is none, as in a torn or damaged table.
  template <typename Table>
  uint32_t PageAt(const Table& table, uint64_t ordinal) const;

  // Calls visit(number) for each page, of any kind, of a trajectory with this commit.
  template <typename Visit>
  void VisitPages(const Slot& at, const Commit& commit, Visit visit) const;

  std::optional<TrajectoryInfo> Look(uint64_t index) const;
  // Record number `index` of a slot, by two loads; nothing where its page number is none.
  std::optional<Record> RecordAt(const Slot& slot, uint32_t index) const;

  const MappedFile file_;
  const Layout layout_;

 private:
  [[noreturn]] void ThrowDamaged(const TrajectoryInfo& info, uint64_t from) const;
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
    if (root >= layout_.pages) return kNoPage;
    number = shared::Load(reinterpret_cast<const shared::Half*>(page(root))[entry % per_page]);
  }
  return number < layout_.pages ? number : kNoPage;
}

}  // namespace kimi

#endif  // KIMI_BUFFER_READER_H_
