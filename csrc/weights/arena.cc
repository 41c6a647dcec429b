#include "weights/arena.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/crc32c.h"
#include "base/shared.h"

namespace kimi::weights {
namespace {

std::string Number(uint64_t value) { return std::to_string(value); }

[[noreturn]] void Refuse(const std::string& path, const std::string& why) {
  throw std::invalid_argument(path + " " + why);
}

constexpr const char* kRecreate = ": create it again and publish into it";

uint32_t HeaderCrc(const Header& header) {
  return crc32c::Extend(0, &header, offsetof(Header, crc));
}

// Returns the offsets of `file`, after checking everything in it that never changes.
Places CheckedPlaces(const MappedFile& file) {
  const std::string& path = file.path();
  if (file.size() < sizeof(Header) || std::memcmp(file.data(), kMagic, sizeof(kMagic)) != 0) {
    Refuse(path, "is not a weight arena: it does not begin with KIMIWGTS");
  }
  const auto& header = *reinterpret_cast<const Header*>(file.data());
  if (header.format > kFormatVersion) {
    Refuse(path, "has format version " + Number(header.format) +
                     ", and this kimi_core reads up to " + Number(kFormatVersion) +
                     ": open it with the kimi_core that made it, or a newer one");
  }
  if (header.crc != HeaderCrc(header)) {
    Refuse(path, std::string("has a damaged header (its checksum is wrong)") + kRecreate);
  }
  const bool possible = header.slots >= kFewestSlots && header.slots <= kMostSlots &&
                        header.leases == kLeases && header.payload_bytes < uint64_t{1} << 56 &&
                        header.description_bytes < uint64_t{1} << 56;
  if (!possible) Refuse(path, std::string("has impossible sizes in its header") + kRecreate);
  const Places places(header);
  if (file.size() < places.FileBytes()) {
    Refuse(path, "is cut off: it has " + Number(file.size()) + " of " + Number(places.FileBytes()) +
                     " bytes" + kRecreate);
  }
  if (header.table_crc != crc32c::Extend(0, file.data() + places.TableAt(), places.table_bytes)) {
    Refuse(path, std::string("has a damaged table of tensors (its checksum is wrong)") + kRecreate);
  }
  return places;
}

}  // namespace

ArenaReader::ArenaReader(const std::string& path)
    : file_(path, MappedFile::Mode::kShare),
      places_(CheckedPlaces(file_)),
      regions_(places_.regions),
      leases_(reinterpret_cast<LeaseEntry*>(file_.data() + kLeasesAt)) {
  file_.Protect(places_.PayloadAt(0));
  std::copy(std::begin(header().layout_hash), std::end(header().layout_hash), hash_.begin());
  const size_t bytes = regions_.size() * sizeof(Region);
  std::memcpy(regions_.data(), table(), bytes);
  description_.assign(reinterpret_cast<const char*>(table()) + bytes, places_.table_bytes - bytes);
}

// If the word is damaged, the states of the slots show which version is the newest complete one.
std::optional<Placed> ArenaReader::Current() const {
  const uint64_t word = shared::LoadOrdered(header().current);
  const auto current = Placed::Unpack(word);
  if (word == 0 || (current && current->slot < slots())) return current;
  std::optional<Placed> newest;
  for (uint32_t slot = 0; slot < slots(); ++slot) {
    const auto state = SlotState::Unpack(shared::LoadOrdered(header().slot[slot].state));
    if (state.kind == SlotState::kReady && (!newest || state.version > newest->version)) {
      newest = Placed{.version = state.version, .slot = slot};
    }
  }
  return newest;
}

Lease ArenaReader::Acquire() {
  if (file_.SizeNow() < places_.FileBytes()) {
    Refuse(path(), "was cut off while it was open: it has " + Number(file_.SizeNow()) + " of " +
                       Number(places_.FileBytes()) + " bytes" + kRecreate);
  }
  auto current = Current();
  if (!current) Refuse(path(), "serves nothing yet: publish a version first");
  const auto entry = leases_.Claim();
  if (!entry) {
    Refuse(path(), "has no lease left: all " + Number(kLeases) +
                       " are held by running processes; release leases that are not needed");
  }
  Lease lease{.entry = *entry, .placed = *current};
  while (true) {
    leases_.Hold(lease.entry, lease.placed);
    // A writer that has served another version meanwhile may not have seen the hold.
    current = Current();
    if (current == lease.placed) return lease;
    if (!current) {
      leases_.Release(lease.entry);
      Refuse(path(), std::string("has a damaged header (the served version is lost)") + kRecreate);
    }
    lease.placed = *current;
  }
}

std::vector<uint32_t> ArenaReader::Crcs(uint32_t slot) const {
  std::vector<uint32_t> found(regions_.size());
  const size_t bytes = found.size() * sizeof(uint32_t);
  shared::CopyOut(found.data(), crcs(slot), bytes);
  if (crc32c::Extend(0, found.data(), bytes) != shared::Load(header().slot[slot].crcs_crc)) {
    Refuse(path(), "is damaged: the table of checksums of slot " + Number(slot) +
                       " fails its own checksum; keep the version you have and publish again");
  }
  return found;
}

std::optional<size_t> ArenaReader::FirstDamaged(uint32_t slot, std::span<const uint32_t> crcs,
                                                unsigned threads) const {
  const auto found = Sum(regions_, payload(slot), threads);
  const auto differs = std::mismatch(found.begin(), found.end(), crcs.begin(), crcs.end()).first;
  if (differs == found.end()) return std::nullopt;
  return static_cast<size_t>(differs - found.begin());
}

void ArenaWriter::Create(const std::string& path, uint32_t slots, uint64_t payload_bytes,
                         const Hash& layout_hash, std::span<const Region> regions,
                         std::string_view description) {
  if (slots < kFewestSlots || slots > kMostSlots) {
    throw std::invalid_argument("slots = " + Number(slots) + ": an arena has " +
                                Number(kFewestSlots) + " to " + Number(kMostSlots) +
                                " slots; one is served while another is written");
  }
  uint64_t end = 0;
  for (const Region& region : regions) {
    if (region.offset < end || region.bytes > payload_bytes ||
        region.offset > payload_bytes - region.bytes || region.bytes % 2 != 0) {
      throw std::invalid_argument("A region of " + Number(region.bytes) + " bytes at " +
                                  Number(region.offset) +
                                  " overlaps the one before it, goes beyond " +
                                  Number(payload_bytes) + " bytes or has an odd size");
    }
    end = region.offset + region.bytes;
  }
  std::string table(reinterpret_cast<const char*>(regions.data()), regions.size_bytes());
  table += description;
  Header header{};
  std::copy(std::begin(kMagic), std::end(kMagic), header.magic);
  header.format = kFormatVersion;
  header.slots = slots;
  header.regions = static_cast<uint32_t>(regions.size());
  header.leases = kLeases;
  header.description_bytes = description.size();
  header.payload_bytes = payload_bytes;
  std::copy(layout_hash.begin(), layout_hash.end(), header.layout_hash);
  header.table_crc = crc32c::Extend(0, table.data(), table.size());
  header.crc = HeaderCrc(header);
  const Places places(header);
  NewFile file(path, places.FileBytes());
  file.Write(0, &header, sizeof(header));
  file.Write(places.TableAt(), table.data(), table.size());
  file.Publish(NewFile::Existing::kRefuse);
}

ArenaWriter::ArenaWriter(const std::string& path)
    : ArenaReader(path),
      written_(path, MappedFile::Mode::kWrite),
      constant_header_(reinterpret_cast<const char*>(&header()), offsetof(Header, unused)),
      constant_table_(reinterpret_cast<const char*>(table()), places_.table_bytes) {
  const auto current = Current();
  for (uint32_t slot = 0; slot < slots(); ++slot) {
    if (current && current->slot == slot) continue;
    const auto state = SlotState::Unpack(shared::Load(header().slot[slot].state));
    const bool was_served =
        state.kind == SlotState::kReady && current && state.version <= current->version;
    if (!was_served) Abandon(slot);
  }
  Repair();
}

// Restores the constant parts of the file and the word that names the served version, in case a
// flipped bit has changed them.
void ArenaWriter::Repair() {
  if (std::memcmp(&header(), constant_header_.data(), constant_header_.size()) != 0) {
    std::memcpy(static_cast<void*>(&header()), constant_header_.data(), constant_header_.size());
  }
  if (std::memcmp(table(), constant_table_.data(), constant_table_.size()) != 0) {
    std::memcpy(table(), constant_table_.data(), constant_table_.size());
  }
  const auto current = Current();
  if (current && shared::Load(header().current) != current->Pack()) {
    shared::StoreOrdered(header().current, current->Pack());
  }
}

std::optional<uint32_t> ArenaWriter::Begin(uint64_t version) {
  if (busy_.exchange(true, std::memory_order_acquire)) {
    throw std::logic_error("Two versions are written into " + path() +
                           " at once: commit or abandon the first before the second");
  }
  const auto give_up = [this] { busy_.store(false, std::memory_order_release); };
  const auto current = Current();
  if (version > Placed::kMostVersion || (current && version <= current->version)) {
    give_up();
    throw std::invalid_argument(
        "Cannot publish version " + Number(version) + " into " + path() +
        (current && version <= current->version
             ? ": it has version " + Number(current->version) + ", and versions only grow"
             : ": the greatest is 2^51 - 1"));
  }
  std::vector<bool> taken(slots(), false);
  if (current) taken[current->slot] = true;
  for (const Holder& holder : Holders()) {
    if (holder.held && holder.held->slot < slots()) taken[holder.held->slot] = true;
  }
  const auto idle = std::find(taken.begin(), taken.end(), false);
  if (idle == taken.end()) {
    give_up();
    return std::nullopt;
  }
  Repair();
  const auto slot = static_cast<uint32_t>(idle - taken.begin());
  const SlotState state{.kind = SlotState::kWriting, .version = version};
  shared::StoreOrdered(header().slot[slot].state, state.Pack());
  begun_ = slot;
  return slot;
}

std::vector<uint32_t> ArenaWriter::Write(uint32_t slot, std::span<const Source> sources,
                                         unsigned threads, size_t first,
                                         std::optional<size_t> count) {
  RequireBegun(slot);
  const size_t most = regions().size() - std::min(first, regions().size());
  if (first > regions().size() || count.value_or(0) > most) {
    throw std::logic_error("Regions " + Number(first) + " and on: there are only " +
                           Number(regions().size()));
  }
  const auto filled = regions().subspan(first, count.value_or(most));
  CheckSources(sources, filled);
  return CopyAndSum(sources, filled, writable(slot), threads);
}

void ArenaWriter::Commit(uint32_t slot, uint64_t version, std::span<const uint32_t> sums) {
  RequireBegun(slot);
  shared::CopyIn(crcs(slot), sums.data(), sums.size_bytes());
  Header::Slot& at = header().slot[slot];
  shared::Store(at.crcs_crc, crc32c::Extend(0, sums.data(), sums.size_bytes()));
  const SlotState ready{.kind = SlotState::kReady, .version = version};
  shared::StoreOrdered(at.state, ready.Pack());
  shared::StoreOrdered(header().current, Placed{.version = version, .slot = slot}.Pack());
  begun_.reset();
  busy_.store(false, std::memory_order_release);
}

void ArenaWriter::Abandon(uint32_t slot) {
  shared::StoreOrdered(header().slot[slot].state, SlotState{}.Pack());
  begun_.reset();
  busy_.store(false, std::memory_order_release);
}

void ArenaWriter::RequireBegun(uint32_t slot) const {
  if (begun_ != slot) throw std::logic_error("Slot " + Number(slot) + " is not being written");
}

void ArenaWriter::CheckSources(std::span<const Source> sources, std::span<const Region> regions) {
  auto source = sources.begin();
  for (const Region& region : regions) {
    uint64_t end = region.offset;
    for (; source != sources.end() && end < region.offset + region.bytes; ++source) {
      if (source->offset != end) break;
      end += source->Bytes();
    }
    if (end != region.offset + region.bytes) {
      throw std::logic_error("The sources leave a gap in the region at " + Number(region.offset));
    }
  }
  if (source != sources.end()) throw std::logic_error("A source lies outside the regions");
}

}  // namespace kimi::weights
