// What BufferWriter does on opening: check everything, cut what is damaged, find the free pages.
//
// After the death of a process nothing is damaged: an append that was not acknowledged is not
// there. After the death of a machine any 4 KiB page may be older than the last sync; checksums
// tell, and each trajectory keeps its longest sound prefix. Recovery itself may be killed anywhere:
// it only shortens what it has found unsound, and finds the same again.
#include <algorithm>

#include "base/shared.h"
#include "buffer/checksum.h"
#include "buffer/writer.h"

namespace kimi {

void BufferWriter::Recover() {
  // The newest first: where two trajectories claim a page, the older one had been evicted, and a
  // lost page of slots brought it back.
  std::vector<uint64_t> order(layout_.max_trajectories);
  for (uint64_t index = 0; index < order.size(); ++index) order[index] = index;
  std::sort(order.begin(), order.end(), [this](uint64_t a, uint64_t b) {
    return slot(a).trajectory_id > slot(b).trajectory_id;
  });
  std::vector<bool> used(layout_.pages, false);
  for (const uint64_t index : order) RecoverSlot(index, used);
  for (uint32_t number = header().pages; number-- > 0;) {
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

  for (uint64_t prompt = 0; prompt < layout_.max_prompts; ++prompt) {
    if (Unseal(prompt_word(prompt))) continue;
    shared::Store(const_cast<uint64_t&>(prompt_word(prompt)), Seal(0));
    ++recovery_.prompts_lost;
  }
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
  shared::StoreRelease(at.commit, sound.Pack());  // Open again, to be continued from there.
  recovery_.cuts.push_back({.trajectory_id = info.trajectory_id,
                            .kept = sound.length,
                            .lost = committed ? committed->length - sound.length : 0});
}

// The longest prefix of sound segments. Where the commit word is lost the records alone say how far
// it goes: a sound one behind the last acknowledged may be taken in, which does no harm.
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
  SegmentCrc crc(info.trajectory_id, info.generation, record);
  const uint64_t per_page = layout_.page_tokens, end = uint64_t{record.start} + record.length;
  for (uint64_t start = record.start, n; start < end; start += n) {
    const uint64_t offset = start % per_page;
    n = std::min(per_page - offset, end - start);
    const uint32_t number = PageAt(slot(info.slot).token_pages, start / per_page);
    if (number == kNoPage) return false;
    const std::byte* at = page(number);
    crc.Add(reinterpret_cast<const int32_t*>(at) + offset,
            reinterpret_cast<const float*>(at + 4 * per_page) + offset,
            reinterpret_cast<const uint8_t*>(at + 8 * per_page) + offset, n);
  }
  return crc.value() == record.crc;
}

// Marks the pages of a trajectory as used; marks none, and says so, where one of them is already.
bool BufferWriter::Claim(const Slot& at, const Commit& commit, std::vector<bool>& used) const {
  std::vector<uint32_t> claimed;
  bool clash = false;
  VisitPages(at, commit, [&](uint32_t number) {
    clash = clash || number >= layout_.pages || used[number];
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
  // Even, and greater than it was, so that no reader takes it for what it had looked at.
  const uint64_t value = at.generation & ((uint64_t{1} << kSealedBits) - 1);
  shared::StoreRelease(at.generation, Seal(((value | 1) + 1) & ((uint64_t{1} << kSealedBits) - 2)));
  ++recovery_.slots_lost;
}

}  // namespace kimi
