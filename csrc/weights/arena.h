// A weight arena: a file with several slots, one of which is served, and versions that only grow.
//
// ArenaReader takes leases on what is served; ArenaWriter, which is one too, fills an idle slot and
// then stores one word, which publishes it: a reader sees a version whole or not at all, and a slot
// in use is never written. See docs/weight_protocol.md.
//
// Synchronisation: one process at a time writes (the file is locked), one slot at a time, which is
// checked: a second one gets std::logic_error. Readers, in any thread or process, need nothing.
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
  // Throws std::invalid_argument for a file that is no arena, damaged in what never changes, cut
  // off or of a newer format, and std::system_error for what the operating system refuses. It needs
  // the right to write: leases are in the file.
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

  // What is served; nothing before the first version is published.
  std::optional<Placed> Current() const;

  // Keeps what is served from being written until Release, or until this process ends. Throws
  // std::invalid_argument where nothing is served, no lease is free or the file was cut.
  Lease Acquire();
  void Release(const Lease& lease) { leases_.Release(lease.entry); }
  std::vector<Holder> Holders() { return leases_.Living(); }

  // A slot's bytes, read-only in memory, too. They are of one version while it is leased.
  const std::byte* payload(uint32_t slot) const { return file_.data() + places_.PayloadAt(slot); }

  // The checksums of what a slot holds, one a region. Throws std::invalid_argument where their own
  // checksum is wrong.
  std::vector<uint32_t> Crcs(uint32_t slot) const;

  // The first region of `slot` whose bytes do not have the checksum of `crcs`.
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
  // Makes an arena with nothing in it. Throws std::invalid_argument for a number of slots or
  // regions out of range, and std::system_error where there is no room or a file already.
  static void Create(const std::string& path, uint32_t slots, uint64_t payload_bytes,
                     const Hash& layout_hash, std::span<const Region> regions,
                     std::string_view description);

  // Throws as ArenaReader, and std::invalid_argument where another process writes. What a writer
  // that died has begun is forgotten.
  explicit ArenaWriter(const std::string& path);

  // Takes a slot that is neither served nor leased for writing `version`; nothing where there is
  // none now. Throws std::invalid_argument unless the version is newer than the newest.
  std::optional<uint32_t> Begin(uint64_t version);

  // REQUIRES, of the rest: Begin has given `slot`, and neither Commit nor Abandon has taken it
  // back.
  std::byte* writable(uint32_t slot) { return written_.data() + places_.PayloadAt(slot); }
  //
  // Write fills `count` regions from `first` on, or all that follow, and returns their checksums.
  std::vector<uint32_t> Write(uint32_t slot, std::span<const Source> sources, unsigned threads,
                              size_t first = 0, std::optional<size_t> count = std::nullopt);
  void Commit(uint32_t slot, uint64_t version, std::span<const uint32_t> crcs);
  void Abandon(uint32_t slot);

 private:
  static void CheckSources(std::span<const Source> sources, std::span<const Region> regions);
  void Repair();
  void RequireBegun(uint32_t slot) const;

  MappedFile written_;  // The file again, where its slots can be written.
  std::string constant_header_, constant_table_;
  std::atomic<bool> busy_ = false;
  std::optional<uint32_t> begun_;
};

}  // namespace kimi::weights

#endif  // KIMI_WEIGHTS_ARENA_H_
