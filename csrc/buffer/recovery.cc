// The recovery that BufferWriter runs on opening: it checks everything, cuts what is damaged and
// finds the free pages.
//
// The death of a process damages nothing: an append that was not acknowledged did not happen. After
// the death of a machine any 4 KiB page may be older than the last sync. Checksums reveal this, and
// each trajectory keeps its longest intact prefix. Recovery itself may be killed at any point: it
// only shortens damaged trajectories, and the next recovery finds the same damage.
#include <algorithm>

#include "base/shared.h"
#include "buffer/checksum.h"
#include "buffer/writer.h"

namespace kimi {

void BufferWriter::Recover() {
  // The newest comes first. If two trajectories claim a page, the older one had been evicted, and
  // the loss of a page of slots restored it.
  std::vector<uint64_t> order(layout_.max_trajectories);
  for (uint64_t index = 0; index < order.size(); ++index) order[index] = index;
  std::sort(order.begin(), order.end(), [this](uint64_t a, uint64_t b) {
    return slot(a).trajectory_id > slot(b).trajectory_id;
  });
  std::vector<bool> used(pages_allocated_, false);
  for (const uint64_t index : order) RecoverSlot(index, used);
  for (auto number = static_cast<uint32_t>(pages_allocated_); number-- > 0;) {
    if (!used[number]) free_pages_.push_back(number);
  }

  uint64_t next_id = Unseal(header().next_id).value(), max_probe = 0;
  for (const TrajectoryInfo& info : Scan()) {
    const auto id = static_cast<uint64_t>(info.trajectory_id), most = layout_.max_trajectories;
    next_id = std::max(next_id, id + 1);
    max_probe = std::max(max_probe, (info.slot + most - id % most) % most);
  }
  shared::StoreRelease(mutable_header().next_id, Seal(next_id));
  shared::StoreRelease(mutable_header().max_probe, Seal(max_probe));
}

void BufferWriter::RecoverSlot(uint64_t index, std::vector<bool>& used) {
  Slot& at = mutable_slot(index);
  const auto generation = Unseal(at.generation);
  if (generation && *generation % 2 == 0) return;
  if (!generation || at.trajectory_id < 0 ||
      at.identity_crc != IdentityCrc(*generation, at.trajectory_id, at.prompt_id, at.group_id)) {
    EmptySlot(index);
    return;
  }
  const TrajectoryInfo info{.slot = static_cast<uint32_t>(index),
                            .generation = *generation,
                            .trajectory_id = at.trajectory_id,
                            .prompt_id = at.prompt_id,
                            .group_id = at.group_id,
                            .lease = Unseal(at.lease).value_or(0),
                            .commit = {}};
  shared::Store(at.lease, Seal(info.lease));
  const auto committed = Commit::Unpack(at.commit);
  Commit sound = SoundPrefix(info, committed);
  while (!Claim(at, sound, used)) {
    sound.length = RecordAt(at, --sound.segments)->start;
  }
  ++recovery_.trajectories;
  recovery_.tokens += sound.length;
  if (committed && committed->length == sound.length && committed->segments == sound.segments) {
    return;
  }
  shared::StoreRelease(at.commit, sound.Pack());  // Open again; sampling continues there.
  recovery_.cuts.push_back({.trajectory_id = info.trajectory_id,
                            .kept = sound.length,
                            .lost = committed ? committed->length - sound.length : 0});
}

// Returns the longest prefix of intact segments. If the commit word is lost, only the records show
// how long the trajectory is. The prefix may then include an intact segment that was never
// acknowledged, which does no harm.
Commit BufferWriter::SoundPrefix(const TrajectoryInfo& info,
                                 std::optional<Commit> committed) const {
  const uint64_t most_segments = committed ? committed->segments : layout_.MaxSegments();
  const uint64_t most_tokens = committed ? committed->length : layout_.MaxLength();
  Commit sound;
  while (sound.segments < most_segments) {
    const auto record = RecordAt(slot(info.slot), sound.segments);
    if (!record || record->start != sound.length || record->length == 0 ||
        record->length > most_tokens - sound.length || !IsSound(info, *record)) {
      break;
    }
    sound.length += record->length;
    ++sound.segments;
  }
  return sound;
}

bool BufferWriter::IsSound(const TrajectoryInfo& info, const Record& record) const {
  const auto page_of = [&](uint64_t k) -> const std::byte* {
    const uint32_t number = PageAt(slot(info.slot).token_pages, k);
    return number == kNoPage ? nullptr : page(number);
  };
  return HasItsCrc(info.trajectory_id, info.generation, record, layout_.page_tokens, page_of);
}

// Marks the pages of a trajectory as used. Returns false and marks none if one is already used.
bool BufferWriter::Claim(const Slot& at, const Commit& commit, std::vector<bool>& used) const {
  std::vector<uint32_t> claimed;
  bool clash = false;
  VisitPages(at, commit, [&](uint32_t number) {
    clash = clash || number >= used.size() || used[number];
    if (clash) return;
    used[number] = true;
    claimed.push_back(number);
  });
  if (!clash) return true;
  for (const uint32_t number : claimed) used[number] = false;
  return false;
}

void BufferWriter::EmptySlot(uint64_t index) {
  Slot& at = mutable_slot(index);
  // The new generation is even and greater, so that a reader does not take the slot for the one
  // that it has looked at before.
  const uint64_t value = at.generation & ((uint64_t{1} << kSealedBits) - 1);
  shared::StoreRelease(at.generation, Seal(((value | 1) + 1) & ((uint64_t{1} << kSealedBits) - 2)));
  ++recovery_.slots_lost;
}

}  // namespace kimi
