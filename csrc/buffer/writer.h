// BufferWriter changes a buffer file; it is a BufferReader, too.
//
// The file is its own log. An append copies the tokens into space that nobody can see, writes the
// segment's record, and then stores the trajectory's commit word, which is the acknowledgement: a
// process killed before that store has appended nothing, one killed after it everything. See
// docs/buffer_format.md.
//
// Synchronisation: one process at a time (the file is locked) and one thread at a time, which is
// checked: a second one gets std::logic_error. Readers, in any thread or process, need nothing.
#ifndef KIMI_BUFFER_WRITER_H_
#define KIMI_BUFFER_WRITER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "buffer/reader.h"
#include "buffer/syncer.h"

namespace kimi {

struct BufferSizes {
  uint64_t capacity_tokens;
  uint64_t max_trajectories;
  uint64_t page_tokens;
  uint64_t max_prompts;
  uint64_t sync_interval_ms;  // 0: never by itself, the process level of durability.
};

struct NewSegment {
  int64_t trajectory_id;
  const int32_t* token_ids;
  const float* logprobs;
  const uint8_t* mask;
  size_t length;
  int32_t policy_version;
  EndReason reason = EndReason::kOpen;  // Ends the trajectory in the same store.
  std::optional<uint64_t> lease;        // Nothing: the writer's own, not checked.
};

// What opening for writing found wrong, and did about it.
struct Recovery {
  struct Cut {
    int64_t trajectory_id;
    uint64_t kept, lost;  // Tokens.
  };
  uint64_t trajectories = 0, tokens = 0;  // Checked and sound.
  std::vector<Cut> cuts;                  // To their longest sound prefix, and open again.
  uint64_t slots_lost = 0;                // Slots whose identity is gone; emptied.
  uint64_t prompts_lost = 0;              // Success counts that were damaged; zeroed.
};

class BufferWriter : public BufferReader {
 public:
  // Makes an empty buffer at `path`. Throws std::invalid_argument for a size out of range, and
  // std::system_error where there is no room or a file already.
  static void Create(const std::string& path, const BufferSizes& sizes);

  // The header of an empty file of these sizes. Throws std::invalid_argument for one out of range.
  static Header HeaderOf(const BufferSizes& sizes);

  // Opens, checks every checksum, and cuts what is damaged. Throws as BufferReader, and
  // std::invalid_argument where another process writes.
  explicit BufferWriter(const std::string& path);

  const Recovery& recovery() const { return recovery_; }

  // Takes a slot for an empty trajectory; ids count up from 0 and are never used again, also after
  // a restart. Throws std::invalid_argument where every slot is taken.
  int64_t Begin(int64_t prompt_id, int64_t group_id);

  // Appends segments in order and writes each trajectory's new length to `lengths`, one a segment.
  // Each segment is acknowledged by itself, should the process die; but an error, thrown as
  // NotFound or std::invalid_argument, comes before anything is appended. A segment of no tokens is
  // no segment, and only its reason counts.
  void Append(std::span<const NewSegment> segments, uint64_t* lengths);

  // Ends a trajectory that has not ended.
  void Finish(int64_t trajectory_id, EndReason reason);

  // A new lease on a trajectory that has not ended: appends under older ones are refused from now.
  uint64_t Resume(int64_t trajectory_id);

  // Forgets trajectories, in this order, and returns which: those of `consumed`, all of which must
  // exist; with `stale_before`, those whose newest policy version is older; with `free_tokens`, the
  // oldest until pages for so many tokens are free.
  std::vector<int64_t> Evict(std::span<const int64_t> consumed, std::optional<int32_t> stale_before,
                             std::optional<uint64_t> free_tokens);

  // Leaves a number below 2^56 in the file, for the owner to tell what the file belongs to.
  void SetMark(uint64_t mark);

  // Counts one response to a prompt, its correctness clipped to [0, 1].
  // Throws std::invalid_argument unless prompt < max_prompts.
  void RecordResult(uint64_t prompt, double correctness);

  // Everything appended before the call is on disk when it returns.
  void Flush() { syncer_.Flush(); }

  // Writes a copy to `path`, whole or not at all and on disk on return; free pages take no space.
  void Snapshot(const std::string& path);

 private:
  class Turn;

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
    uint64_t call = 0;  // Of Append; a stale entry is of an earlier one.
    Commit commit;
  };
  Commit& PlannedFor(const TrajectoryInfo& info);
  void CheckSegment(const NewSegment& segment, const TrajectoryInfo& info,
                    const Commit& planned) const;
  void CheckRoom(uint64_t pages, uint64_t tokens) const;
  uint64_t AppendOne(const TrajectoryInfo& info, const NewSegment& segment);
  void CopyTokens(Slot& at, uint64_t start, const NewSegment& segment);
  void PutRecord(Slot& at, uint32_t index, const Record& record);
  template <typename Table>
  void SetPage(Table& table, uint64_t ordinal, uint32_t number);
  uint32_t TakePage();

  void EvictOne(const TrajectoryInfo& info);

  std::vector<uint32_t> free_pages_;  // The next one to be taken is the last.
  std::atomic<bool> busy_ = false;
  Recovery recovery_;

  // Scratch of Append: the trajectory of each segment, and by slot what it will be.
  std::vector<TrajectoryInfo> infos_;
  std::vector<Planned> planned_;
  uint64_t calls_ = 0;

  Syncer syncer_;
};

}  // namespace kimi

#endif  // KIMI_BUFFER_WRITER_H_
