#include "weights/leases.h"

#include "base/shared.h"

namespace kimi::weights {
namespace {

// The twin counts only if the word itself is damaged, because the two are not stored at once.
std::optional<uint64_t> Read(const uint64_t& word, const uint64_t& twin) {
  const auto value = Unseal(shared::LoadOrdered(word));
  return value ? value : Unseal(shared::LoadOrdered(twin));
}

}  // namespace

std::optional<uint32_t> Leases::Claim() {
  const uint64_t mine = Seal(ProcessId::OfThisProcess().Pack());
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (uint32_t entry = 0; entry < kLeases; ++entry) {
      if (shared::LoadOrdered(entries_[entry].owner) != 0) continue;
      if (!shared::Replace(entries_[entry].owner, uint64_t{0}, mine)) continue;
      shared::StoreOrdered(entries_[entry].owner_twin, mine);
      return entry;
    }
    Living();  // Frees the entries of dead processes.
  }
  return std::nullopt;
}

void Leases::Hold(uint32_t entry, const Placed& placed) {
  shared::StoreOrdered(entries_[entry].hold_twin, placed.Pack());
  shared::StoreOrdered(entries_[entry].hold, placed.Pack());
}

void Leases::Release(uint32_t entry) {
  shared::StoreOrdered(entries_[entry].hold_twin, uint64_t{0});
  shared::StoreOrdered(entries_[entry].hold, uint64_t{0});
  shared::StoreOrdered(entries_[entry].owner_twin, uint64_t{0});
  shared::StoreOrdered(entries_[entry].owner, uint64_t{0});
}

// The hold of a dead owner stays in its entry, where it has no effect. Clearing it could remove the
// hold of a process that has claimed the entry since.
std::vector<Holder> Leases::Living() {
  std::vector<Holder> living;
  for (uint32_t index = 0; index < kLeases; ++index) {
    LeaseEntry& entry = entries_[index];
    const uint64_t word = shared::LoadOrdered(entry.owner);
    if (word == 0) continue;
    const auto value = Read(word, entry.owner_twin);
    const auto owner = ProcessId::Unpack(value.value_or(0));
    // With both words damaged the owner is unknown, and the entry stays.
    if (value && (*value == 0 || !owner.IsAlive())) {
      shared::Replace(entry.owner, word, uint64_t{0});
      continue;
    }
    Holder holder{.owner = owner, .held = std::nullopt};
    const auto hold = Read(entry.hold, entry.hold_twin);
    if (hold) holder.held = Placed::Unpack(Seal(*hold));
    living.push_back(holder);
  }
  return living;
}

}  // namespace kimi::weights
