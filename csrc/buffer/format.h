// What a buffer file looks like, byte by byte; docs/buffer_format.md says why it survives a crash.
//
//   header | success counts, one a prompt | slots, one a trajectory | pages
//
// Pages are all of one size and hold tokens, segment records, or the numbers of other pages. Which
// pages are free is written nowhere: those that no slot reaches.
#ifndef KIMI_BUFFER_FORMAT_H_
#define KIMI_BUFFER_FORMAT_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/sealed.h"

namespace kimi {

constexpr char kMagic[8] = {'K', 'I', 'M', 'I', 'R', 'O', 'L', 'L'};
constexpr uint32_t kFormatVersion = 1;
constexpr size_t kAlignment = 4096;  // Of the parts of a file.
constexpr uint32_t kNoPage = ~uint32_t{0};

// ---- The commit word of a trajectory: what of it exists. Storing it acknowledges an append.

enum class EndReason : uint8_t { kOpen = 0, kStop = 1, kLength = 2, kRepeat = 3 };
constexpr uint64_t kMaxLength = (uint64_t{1} << 28) - 1;
constexpr uint64_t kMaxSegments = (uint64_t{1} << 24) - 1;

struct Commit {
  uint32_t length = 0;    // Tokens.
  uint32_t segments = 0;  // Records.
  EndReason reason = EndReason::kOpen;

  uint64_t Pack() const {
    return Seal(uint64_t{length} | uint64_t{segments} << 28 | static_cast<uint64_t>(reason) << 52);
  }
  static std::optional<Commit> Unpack(uint64_t word) {
    const auto value = Unseal(word);
    if (!value || *value >> 52 > static_cast<uint64_t>(EndReason::kRepeat)) return std::nullopt;
    return Commit{.length = static_cast<uint32_t>(*value & kMaxLength),
                  .segments = static_cast<uint32_t>(*value >> 28 & kMaxSegments),
                  .reason = static_cast<EndReason>(*value >> 52)};
  }
};

// ---- Structures in the file

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t page_tokens;
  uint32_t pages;
  uint32_t max_trajectories;
  uint32_t max_prompts;
  uint32_t sync_interval_ms;  // 0: the process level of durability.
  uint32_t crc;               // CRC32C of all of the above, which never changes.
  uint32_t unused;
  uint64_t next_id;    // Sealed. The id of the next trajectory; never less than one ever used.
  uint64_t mark;       // Sealed. A number of the owner's.
  uint64_t max_probe;  // Sealed. No trajectory lies further behind its home slot than this.
};

// One segment: tokens [start, start + length) of its trajectory.
struct Record {
  uint32_t start;
  uint32_t length;
  int32_t policy_version;
  uint32_t crc;  // See checksum.h.
};

// Numbers of pages by position: some at hand, the others in pages that hold nothing but numbers.
template <size_t kDirect, size_t kRoots>
struct PageTable {
  static constexpr size_t kDirectEntries = kDirect;
  static constexpr size_t kRootEntries = kRoots;
  uint32_t direct[kDirect];
  uint32_t roots[kRoots];
};

constexpr uint32_t kInlineRecords = 12;

struct Slot {
  uint64_t generation;  // Sealed. Odd: in use. Each begin and each eviction adds 1.
  uint64_t commit;      // Sealed: Commit.
  int64_t trajectory_id;
  int64_t prompt_id;
  int64_t group_id;
  uint64_t lease;         // Sealed. Appends under an older one are refused.
  uint32_t identity_crc;  // CRC32C of the generation and the three ids.
  uint32_t unused;
  Record records[kInlineRecords];
  PageTable<32, 16> token_pages;  // Entry i: the page of tokens [i * page_tokens, ...).
  PageTable<12, 6> record_pages;  // Entry i: a page of the records after the inline ones.
};

static_assert(sizeof(Header) == 64 && sizeof(Record) == 16);
static_assert(sizeof(Slot) == 512, "a slot fills one sector of a disk, which is written whole");
// As docs/buffer_format.md says.
static_assert(offsetof(Header, crc) == 32 && offsetof(Header, next_id) == 40);
static_assert(offsetof(Slot, identity_crc) == 48 && offsetof(Slot, records) == 56);
static_assert(offsetof(Slot, token_pages) == 248 && offsetof(Slot, record_pages) == 440);

// ---- Where things are

struct Layout {
  uint64_t page_tokens, pages, max_trajectories, max_prompts;

  explicit Layout(const Header& header)
      : page_tokens(header.page_tokens),
        pages(header.pages),
        max_trajectories(header.max_trajectories),
        max_prompts(header.max_prompts) {}

  uint64_t PageBytes() const { return 9 * page_tokens; }  // An int32, a float32 and a uint8 each.
  uint64_t EntriesPerPage() const { return PageBytes() / sizeof(uint32_t); }
  uint64_t RecordsPerPage() const { return PageBytes() / sizeof(Record); }

  uint64_t PromptsAt() const { return kAlignment; }
  uint64_t SlotsAt() const { return PromptsAt() + Aligned(max_prompts * sizeof(uint64_t)); }
  uint64_t PagesAt() const { return SlotsAt() + Aligned(max_trajectories * sizeof(Slot)); }
  uint64_t FileBytes() const { return PagesAt() + pages * PageBytes(); }

  uint64_t TokenPages(uint64_t tokens) const { return Ratio(tokens, page_tokens); }
  uint64_t RecordPages(uint64_t segments) const {
    return segments <= kInlineRecords ? 0 : Ratio(segments - kInlineRecords, RecordsPerPage());
  }
  // Pages of every kind that a trajectory takes.
  uint64_t PagesOf(uint64_t tokens, uint64_t segments) const {
    const uint64_t token_pages = TokenPages(tokens), record_pages = RecordPages(segments);
    return token_pages + IndexPages(decltype(Slot::token_pages)(), token_pages) + record_pages +
           IndexPages(decltype(Slot::record_pages)(), record_pages);
  }
  // Pages that hold the numbers of `listed` others, besides those that the table itself holds.
  template <size_t kDirect, size_t kRoots>
  uint64_t IndexPages(const PageTable<kDirect, kRoots>&, uint64_t listed) const {
    return listed <= kDirect ? 0 : Ratio(listed - kDirect, EntriesPerPage());
  }
  // The longest trajectory that the page tables of a slot can hold, and the most segments.
  uint64_t MaxLength() const {
    const uint64_t held = MostPages<decltype(Slot::token_pages)>() * page_tokens;
    return held < kMaxLength ? held : kMaxLength;
  }
  uint64_t MaxSegments() const {
    const uint64_t held = MostPages<decltype(Slot::record_pages)>() * RecordsPerPage();
    return kInlineRecords + held < kMaxSegments ? kInlineRecords + held : kMaxSegments;
  }

 private:
  static uint64_t Ratio(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
  static uint64_t Aligned(uint64_t size) { return Ratio(size, kAlignment) * kAlignment; }

  template <typename Table>
  uint64_t MostPages() const {
    return Table::kDirectEntries + Table::kRootEntries * EntriesPerPage();
  }
};

}  // namespace kimi

#endif  // KIMI_BUFFER_FORMAT_H_
