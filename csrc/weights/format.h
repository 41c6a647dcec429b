// The layout of an arena file, byte by byte. docs/weight_protocol.md gives the order of stores and
// what each crash leaves.
//
//   header | leases | regions and description | checksums, a table for each slot | slots
//
// All slots have the same layout. The description is text that describes it and that this code does
// not read. Regions are the parts of a slot that have a checksum: one for each tensor.
#ifndef KIMI_WEIGHTS_FORMAT_H_
#define KIMI_WEIGHTS_FORMAT_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/sealed.h"

namespace kimi::weights {

constexpr char kMagic[8] = {'K', 'I', 'M', 'I', 'W', 'G', 'T', 'S'};
constexpr uint32_t kFormatVersion = 1;
constexpr uint64_t kAlignment = 4096;  // Of each part of the file and each slot, in bytes.
constexpr uint32_t kFewestSlots = 2, kMostSlots = 8;
constexpr uint32_t kLeases = 128;

// ---- Sealed words

// A version and its slot: the served one, or the one that a lease holds. The word 0 is none.
struct Placed {
  uint64_t version = 0;
  uint32_t slot = 0;

  static constexpr uint64_t kMostVersion = (uint64_t{1} << 51) - 1;

  uint64_t Pack() const { return Seal((version + 1) << 4 | slot); }
  static std::optional<Placed> Unpack(uint64_t word) {
    const auto value = Unseal(word);
    if (!value || *value >> 4 == 0) return std::nullopt;
    return Placed{.version = (*value >> 4) - 1, .slot = static_cast<uint32_t>(*value & 15)};
  }
  bool operator==(const Placed&) const = default;
};

// The state of a slot. A crash may leave kWriting behind.
struct SlotState {
  enum Kind : uint8_t { kEmpty = 0, kWriting = 1, kReady = 2 };
  Kind kind = kEmpty;
  uint64_t version = 0;

  uint64_t Pack() const { return kind == kEmpty ? 0 : Seal((version + 1) << 4 | kind); }
  // A damaged state counts as empty.
  static SlotState Unpack(uint64_t word) {
    const uint64_t value = Unseal(word).value_or(0), kind = value & 15;
    if (value >> 4 == 0 || kind > kReady) return {};
    return {.kind = static_cast<Kind>(kind), .version = (value >> 4) - 1};
  }
};

// ---- Structures in the file

struct Header {
  char magic[8];
  uint32_t format;
  uint32_t slots;
  uint32_t regions;
  uint32_t leases;
  uint64_t description_bytes;
  uint64_t payload_bytes;  // Of one slot.
  uint8_t layout_hash[32];
  uint32_t table_crc;  // CRC32C of regions and description.
  uint32_t crc;        // CRC32C of all fields above, which never change.
  uint8_t unused[48];
  uint64_t current;  // Sealed Placed. Storing it publishes a version.
  uint8_t unused_too[56];
  struct Slot {
    uint64_t state;     // Sealed SlotState.
    uint32_t crcs_crc;  // CRC32C of the slot's table of checksums.
    uint8_t unused[52];
  } slot[kMostSlots];
};

struct Region {
  uint64_t offset;  // From the start of the slot.
  uint64_t bytes;
};

// A reader's lease; the entry is free if the owner is 0. Each word has a twin that replaces it if
// it is damaged, because a lost lease would allow a torn read.
struct LeaseEntry {
  uint64_t owner, owner_twin;  // Sealed ProcessId.
  uint64_t hold, hold_twin;    // Sealed Placed.
  uint8_t unused[32];
};

static_assert(sizeof(Region) == 16);
static_assert(sizeof(LeaseEntry) == 64, "two readers do not share a cache line");
// The offsets that docs/weight_protocol.md gives.
static_assert(offsetof(Header, layout_hash) == 40 && offsetof(Header, crc) == 76);
static_assert(offsetof(Header, current) == 128 && offsetof(Header, slot) == 192);
static_assert(sizeof(Header) == 192 + 64 * kMostSlots && sizeof(Header) <= kAlignment);

// ---- Offsets and sizes

constexpr uint64_t Aligned(uint64_t size) {
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

constexpr uint64_t kLeasesAt = kAlignment;

struct Places {
  uint64_t slots, regions, table_bytes, payload_bytes;

  explicit Places(const Header& header)
      : slots(header.slots),
        regions(header.regions),
        table_bytes(header.regions * sizeof(Region) + header.description_bytes),
        payload_bytes(header.payload_bytes) {}

  uint64_t TableAt() const { return kLeasesAt + Aligned(kLeases * sizeof(LeaseEntry)); }
  uint64_t CrcsAt(uint64_t slot) const {
    return TableAt() + Aligned(table_bytes) + slot * CrcBytes();
  }
  uint64_t CrcBytes() const { return (regions * sizeof(uint32_t) + 63) / 64 * 64; }
  uint64_t PayloadAt(uint64_t slot) const {
    return Aligned(CrcsAt(slots)) + slot * Aligned(payload_bytes);
  }
  uint64_t FileBytes() const { return PayloadAt(slots); }
};

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_FORMAT_H_
