// A weight arena: a file with several slots, one of which is served. Version numbers only grow.
//
// ArenaReader takes leases on the served version. ArenaWriter, which is also an ArenaReader, fills
// an idle slot and then stores one word, which publishes it. A reader sees a version as a whole or
// not at all, and a slot in use is never written. See docs/weight_protocol.md.
//
// Synchronisation: one process at a time writes (the file is locked), and one slot at a time: a
// second Begin gets std::logic_error. Readers, in any thread or process, need no synchronisation.
#ifndef KIMI_WEIGHTS_ARENA_H_
#define KIMI_WEIGHTS_ARENA_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapped_file.h"
#include "weights/copy.h"
#include "weights/format.h"
#include "weights/leases.h"

namespace kimi::weights {

using Hash = std::array<uint8_t, 32>;

struct Lease {
  uint32_t entry;
  Placed placed;
};

class ArenaReader {
 public:
  // Throws std::invalid_argument if the file is not an arena, has damaged constant parts, is cut
  // off or has a newer format, and std::system_error if the operating system refuses a step. Needs
  // the permission to write, because leases are in the file.
  explicit ArenaReader(const std::string& path);
  virtual ~ArenaReader() = default;

  ArenaReader(const ArenaReader&) = delete;
  ArenaReader& operator=(const ArenaReader&) = delete;

  const std::string& path() const { return file_.path(); }
  uint32_t slots() const { return static_cast<uint32_t>(places_.slots); }
  uint64_t payload_bytes() const { return places_.payload_bytes; }
  const Hash& layout_hash() const { return hash_; }
  std::span<const Region> regions() const { return regions_; }
  const std::string& description() const { return description_; }

  // The served version and its slot; nothing before the first version is published.
  std::optional<Placed> Current() const;

  // Takes a lease on the served version: its slot is not written until Release or the end of this
  // process. Throws std::invalid_argument if nothing is served, no lease is free or the file is cut
  // off.
  Lease Acquire();
  void Release(const Lease& lease) { leases_.Release(lease.entry); }
  std::vector<Holder> Holders() { return leases_.Living(); }

  // The bytes of a slot, in read-only memory. They belong to one version while it is leased.
  const std::byte* payload(uint32_t slot) const { return file_.data() + places_.PayloadAt(slot); }

  // The checksums of a slot's regions. Throws std::invalid_argument if their table is damaged.
  std::vector<uint32_t> Crcs(uint32_t slot) const;

  // The first region of `slot` whose checksum differs from the one in `crcs`, if any.
  std::optional<size_t> FirstDamaged(uint32_t slot, std::span<const uint32_t> crcs,
                                     unsigned threads) const;

 protected:
  Header& header() const { return *reinterpret_cast<Header*>(file_.data()); }
  std::byte* table() const { return file_.data() + places_.TableAt(); }
  uint32_t* crcs(uint32_t slot) const {
    return reinterpret_cast<uint32_t*>(file_.data() + places_.CrcsAt(slot));
  }

  MappedFile file_;
  const Places places_;

 private:
  Hash hash_;
  std::vector<Region> regions_;
  std::string description_;
  Leases leases_;
};

class ArenaWriter : public ArenaReader {
 public:
  // Creates an empty arena. Throws std::invalid_argument if the number of slots or a region is out
  // of range, and std::system_error if the disk is full or the file exists.
  static void Create(const std::string& path, uint32_t slots, uint64_t payload_bytes,
                     const Hash& layout_hash, std::span<const Region> regions,
                     std::string_view description);

  // Throws as ArenaReader, and std::invalid_argument if another process is the writer. Discards
  // what a writer that died had begun.
  explicit ArenaWriter(const std::string& path);

  // Takes a slot that is neither served nor leased, to write `version`. Returns nothing if there is
  // none now. Throws std::invalid_argument unless the version is greater than the newest one.
  std::optional<uint32_t> Begin(uint64_t version);

  // The functions below REQUIRE that Begin has returned `slot` and that it is still open.
  std::byte* writable(uint32_t slot) { return written_.data() + places_.PayloadAt(slot); }
  // Fills `count` regions from `first` on, by default all, and returns their checksums.
  std::vector<uint32_t> Write(uint32_t slot, std::span<const Source> sources, unsigned threads,
                              size_t first = 0, std::optional<size_t> count = std::nullopt);
  void Commit(uint32_t slot, uint64_t version, std::span<const uint32_t> crcs);
  void Abandon(uint32_t slot);

 private:
  static void CheckSources(std::span<const Source> sources, std::span<const Region> regions);
  void Repair();
  void RequireBegun(uint32_t slot) const;

  MappedFile written_;  // A second mapping of the file, in which slots are writable.
  std::string constant_header_, constant_table_;
  std::atomic<bool> busy_ = false;
  std::optional<uint32_t> begun_;
};

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_ARENA_H_
