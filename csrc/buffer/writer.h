// BufferWriter changes a buffer file; it is also a BufferReader.
//
// The file needs no separate log. An append copies the tokens into space that no reader sees,
// writes the record of the segment, and then stores the commit word of the trajectory. That store
// is the acknowledgement: a process that is killed before it has appended nothing, and one that is
// killed after it has appended everything. See docs/buffer_format.md.
//
// The file takes disk space as it needs it. An append reuses the pages of evicted trajectories; if
// they do not suffice, it first makes the file longer. A full disk is found there, before anything
// is appended.
//
// Synchronisation: one process at a time writes (the file is locked), and one thread at a time: a
// second thread gets std::logic_error. Readers, in any thread or process, need no synchronisation.
#ifndef KIMI_BUFFER_WRITER_H_
#define KIMI_BUFFER_WRITER_H_

#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "buffer/reader.h"

namespace kimi {

struct BufferSizes {
  uint64_t capacity_tokens;
  uint64_t max_trajectories;
  uint64_t page_tokens;
};

struct NewSegment {
  int64_t trajectory_id;
  const int32_t* token_ids;
  const float* logprobs;
  const uint8_t* mask;
  size_t length;
  int32_t policy_version;
  EndReason reason = EndReason::kOpen;  // A reason ends the trajectory in the same store.
  std::optional<uint64_t> lease;        // No value: the lease is not checked.
};

// What the recovery on opening found and did.
struct Recovery {
  struct Cut {
    int64_t trajectory_id;
    uint64_t kept, lost;  // Tokens.
  };
  uint64_t trajectories = 0, tokens = 0;  // Checked and intact.
  std::vector<Cut> cuts;                  // Cut to the longest intact prefix, and open again.
  uint64_t slots_lost = 0;                // Emptied, because their ids or generation are damaged.
};

class BufferWriter : public BufferReader {
 public:
  // Creates an empty buffer, without a page, at `path`. Throws std::invalid_argument if a size is
  // out of range, and std::system_error if the disk is full or the file exists.
  static void Create(const std::string& path, const BufferSizes& sizes);

  // The header of an empty file. Throws std::invalid_argument if a size is out of range.
  static Header HeaderOf(const BufferSizes& sizes);

  // Opens the file, compares every checksum and cuts what is damaged. Throws as BufferReader, and
  // std::invalid_argument if another process has the file open for writing.
  explicit BufferWriter(const std::string& path);

  const Recovery& recovery() const { return recovery_; }

  // Opens an empty trajectory and returns its id. Ids count up from 0 and are never reused, not
  // even after a restart. Throws std::invalid_argument if every slot is in use.
  int64_t Begin(int64_t prompt_id, int64_t group_id);

  // Appends segments in order, and writes the new length of its trajectory to `lengths` for each.
  // Each segment is acknowledged separately. An error (NotFound or std::invalid_argument) is thrown
  // before anything is appended, and so is std::system_error if the file must grow and the disk is
  // full. An empty segment adds no record; only its reason counts.
  void Append(std::span<const NewSegment> segments, uint64_t* lengths);

  // Ends a trajectory that has not ended.
  void Finish(int64_t trajectory_id, EndReason reason);

  // Returns a new lease on an unfinished trajectory. Appends under older ones are then refused.
  uint64_t Resume(int64_t trajectory_id);

  // Removes trajectories and frees their pages. An id may occur twice. Throws NotFound if one does
  // not exist; then none is removed.
  void Evict(std::span<const int64_t> trajectory_ids);

  // Stores a number below 2^56 in the file. The owner of the file gives it its meaning.
  void SetMark(uint64_t mark);

  // Returns when everything appended before is on disk. Throws std::system_error.
  void Flush() const { file_.Sync(); }

  // Writes a copy to `path`. The copy appears as a whole or not at all, and is on disk on return.
  // Free pages take no disk space, and the copy ends behind the last page in use.
  void Snapshot(const std::string& path);

 private:
  class WriteGuard;

  Header& mutable_header() { return *reinterpret_cast<Header*>(file_.data()); }
  Slot& mutable_slot(uint64_t index) { return const_cast<Slot&>(slot(index)); }

  // Opening, in recovery.cc.
  void Recover();
  void RecoverSlot(uint64_t index, std::vector<bool>& used);
  Commit SoundPrefix(const TrajectoryInfo& info, std::optional<Commit> committed) const;
  bool IsSound(const TrajectoryInfo& info, const Record& record) const;
  bool Claim(const Slot& at, const Commit& commit, std::vector<bool>& used) const;
  void EmptySlot(uint64_t index);

  // Appending.
  struct Planned {
    uint64_t call = 0;  // Number of the Append call; an entry of an earlier call is stale.
    Commit commit;
  };
  Commit& PlannedFor(const TrajectoryInfo& info);
  void CheckSegment(const NewSegment& segment, const TrajectoryInfo& info,
                    const Commit& planned) const;
  void CheckRoom(uint64_t pages, uint64_t tokens) const;
  void Grow(uint64_t missing);
  uint64_t AppendOne(const TrajectoryInfo& info, const NewSegment& segment);
  void CopyTokens(Slot& at, uint64_t start, const NewSegment& segment);
  void PutRecord(Slot& at, uint32_t index, const Record& record);
  template <typename Table>
  void SetPage(Table& table, uint64_t ordinal, uint32_t number);
  uint32_t TakePage();

  void EvictOne(const TrajectoryInfo& info);

  uint64_t PagesFree() const { return free_pages_.size() + layout_.pages - pages_allocated_; }

  uint64_t pages_allocated_;          // The first ones, on the disk and in memory.
  std::vector<uint32_t> free_pages_;  // Of these. TakePage takes from the end.
  std::atomic<bool> busy_ = false;
  Recovery recovery_;

  // Working memory of Append: the trajectory of each segment, and each slot's commit afterwards.
  std::vector<TrajectoryInfo> infos_;
  std::vector<Planned> planned_;
  uint64_t calls_ = 0;
};

}  // namespace kimi

#endif  // KIMI_BUFFER_WRITER_H_
