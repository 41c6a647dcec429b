// The layout of a buffer file, byte by byte. docs/buffer_format.md explains why it survives a
// crash.
//
//   header | reserved words | slots, one for each trajectory | pages
//
// The file ends behind the pages that were needed so far and grows up to the number in its header.
//
// All pages have the same size. A page holds tokens, segment records, or the numbers of other
// pages. The file does not list its free pages: a page is free if no slot reaches it.
#ifndef KIMI_BUFFER_FORMAT_H_
#define KIMI_BUFFER_FORMAT_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/sealed.h"

namespace kimi {

constexpr char kMagic[8] = {'K', 'I', 'M', 'I', 'R', 'O', 'L', 'L'};
constexpr uint32_t kFormatVersion = 2;
constexpr uint32_t kWholeVersion = 1;  // Files of this version have all their pages from the start.
constexpr size_t kAlignment = 4096;    // Of each part of the file, in bytes.
constexpr uint32_t kNoPage = ~uint32_t{0};

// ---- The commit word says how much of a trajectory exists. Storing it acknowledges an append.

enum class EndReason : uint8_t { kOpen = 0, kStop = 1, kLength = 2, kRepeat = 3 };
constexpr const char* kReasonNames[] = {"open", "stop", "length", "repeat"};
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
  uint32_t pages;  // The most that the file may grow to.
  uint32_t max_trajectories;
  uint32_t reserved_words;    // Words between header and slots, which nothing uses; 0 in new files.
  uint32_t reserved_setting;  // Not used; 0 in new files.
  uint32_t crc;               // CRC32C of all fields above, which never change.
  uint32_t unused;
  uint64_t next_id;    // Sealed. The id of the next trajectory, above every id ever used.
  uint64_t mark;       // Sealed. A number that the file's owner may set.
  uint64_t max_probe;  // Sealed. Greatest distance of a trajectory from its home slot, in slots.
};

// One segment: tokens [start, start + length) of its trajectory.
struct Record {
  uint32_t start;
  uint32_t length;
  int32_t policy_version;
  uint32_t crc;  // See checksum.h.
};

// Page numbers by position: the first ones directly, the others in pages that list pages.
template <size_t kDirect, size_t kRoots>
struct PageTable {
  static constexpr size_t kDirectEntries = kDirect;
  static constexpr size_t kRootEntries = kRoots;
  uint32_t direct[kDirect];
  uint32_t roots[kRoots];
};

constexpr uint32_t kInlineRecords = 12;

struct Slot {
  uint64_t generation;  // Sealed. Odd while the slot is in use. Begin and eviction add 1 each.
  uint64_t commit;      // Sealed: Commit.
  int64_t trajectory_id;
  int64_t prompt_id;
  int64_t group_id;
  uint64_t lease;         // Sealed. Appends that name an older lease are refused.
  uint32_t identity_crc;  // CRC32C of the generation and of the three ids.
  uint32_t unused;
  Record records[kInlineRecords];
  PageTable<32, 16> token_pages;  // Entry i: the page of tokens from i * page_tokens on.
  PageTable<12, 6> record_pages;  // Entry i: the i-th page of further records.
};

static_assert(sizeof(Header) == 64 && sizeof(Record) == 16);
static_assert(sizeof(Slot) == 512, "a slot fills one disk sector, which a disk writes as a whole");
// The offsets that docs/buffer_format.md gives.
static_assert(offsetof(Header, crc) == 32 && offsetof(Header, next_id) == 40);
static_assert(offsetof(Slot, identity_crc) == 48 && offsetof(Slot, records) == 56);
static_assert(offsetof(Slot, token_pages) == 248 && offsetof(Slot, record_pages) == 440);

// ---- Offsets and sizes

constexpr uint64_t kPageMultiple = 8;  // So that the columns of a page are aligned.
constexpr uint64_t kMostPageTokens = 65536;
constexpr uint64_t kMostCount = uint64_t{1} << 31;  // Pages and slots are below it.

// Whether a buffer can have been created with these sizes.
inline bool HasPossibleSizes(const Header& header) {
  const auto counts = [](uint64_t number) { return 0 < number && number < kMostCount; };
  const uint64_t page = header.page_tokens;
  return 0 < page && page <= kMostPageTokens && page % kPageMultiple == 0 && counts(header.pages) &&
         counts(header.max_trajectories);
}

struct Layout {
  uint64_t page_tokens, pages, max_trajectories, reserved_words;

  explicit Layout(const Header& header)
      : page_tokens(header.page_tokens),
        pages(header.pages),
        max_trajectories(header.max_trajectories),
        reserved_words(header.reserved_words) {}

  uint64_t PageBytes() const { return 9 * page_tokens; }  // int32, float32 and uint8 columns.
  uint64_t EntriesPerPage() const { return PageBytes() / sizeof(uint32_t); }
  uint64_t RecordsPerPage() const { return PageBytes() / sizeof(Record); }

  uint64_t SlotsAt() const { return kAlignment + Aligned(reserved_words * sizeof(uint64_t)); }
  uint64_t PagesAt() const { return SlotsAt() + Aligned(max_trajectories * sizeof(Slot)); }
  // The size of a file that ends behind its first `count` pages.
  uint64_t BytesWith(uint64_t count) const { return PagesAt() + count * PageBytes(); }
  uint64_t MostBytes() const { return BytesWith(pages); }
  // The number of whole pages in a file of this size.
  uint64_t PagesIn(uint64_t bytes) const {
    const uint64_t whole = bytes < PagesAt() ? 0 : (bytes - PagesAt()) / PageBytes();
    return whole < pages ? whole : pages;
  }

  uint64_t TokenPages(uint64_t tokens) const { return Ratio(tokens, page_tokens); }
  uint64_t RecordPages(uint64_t segments) const {
    return segments <= kInlineRecords ? 0 : Ratio(segments - kInlineRecords, RecordsPerPage());
  }
  // The number of pages of every kind that a trajectory takes.
  uint64_t PagesOf(uint64_t tokens, uint64_t segments) const {
    const uint64_t token_pages = TokenPages(tokens), record_pages = RecordPages(segments);
    return token_pages + IndexPages(decltype(Slot::token_pages)(), token_pages) + record_pages +
           IndexPages(decltype(Slot::record_pages)(), record_pages);
  }
  // The number of pages that list other pages, for `listed` pages in all.
  template <size_t kDirect, size_t kRoots>
  uint64_t IndexPages(const PageTable<kDirect, kRoots>&, uint64_t listed) const {
    return listed <= kDirect ? 0 : Ratio(listed - kDirect, EntriesPerPage());
  }
  // The most tokens and the most segments that the page tables of a slot can list.
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
