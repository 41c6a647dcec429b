#include "weights/copy.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <thread>

#include "base/crc32c.h"

#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#include <emmintrin.h>
#define KIMI_STREAMS 1  // ThreadSanitizer does not see such stores.
#endif

namespace kimi::weights {
namespace {

constexpr uint64_t kPieceBytes = uint64_t{4} << 20;  // A thread takes one piece at a time.
constexpr size_t kLine = 64;
constexpr size_t kChunkBytes = 3 * 2048;  // Cast, summed and copied at a time, while in cache.

// Some columns of some rows of a source, and the checksum of their written bytes.
struct Piece {
  const Source* source;
  uint64_t row, rows, column, columns;
  uint32_t crc = 0;

  uint64_t Bytes() const { return rows * columns * SizeOf(source->to); }
  uint64_t Offset() const {
    return source->offset + (row * source->columns + column) * SizeOf(source->to);
  }
};

// Calls `work(i)` once for each i in [0, n), on `threads` threads.
template <typename Work>
void Share(size_t n, unsigned threads, const Work& work) {
  std::atomic<size_t> next = 0;
  const auto run = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
  };
  std::vector<std::jthread> others;
  for (size_t i = 1; i < std::min<size_t>(threads, n); ++i) others.emplace_back(run);
  run();
}

// Copies with stores that bypass the caches: the copy is not read soon, and its memory need not be
// read first. For each line that it writes, it prefetches `lines` lines from `next` on.
void Stream(std::byte* to, const std::byte* from, size_t bytes,
            [[maybe_unused]] const std::byte* next, [[maybe_unused]] size_t lines) {
#if defined(KIMI_STREAMS)
  if (reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0) {
    for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine, next += lines * kLine) {
      for (size_t line = 0; line < lines; ++line) __builtin_prefetch(next + line * kLine);
      for (size_t at = 0; at < kLine; at += sizeof(__m128i)) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + at),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
      }
    }
  }
#endif
  std::memcpy(to, from, bytes);
}

void CopyAndSum(Piece& piece, std::byte* slot) {
  const Source& source = *piece.source;
  const size_t width = SizeOf(source.from), written_width = SizeOf(source.to);
  const auto* data = static_cast<const std::byte*>(source.data);
  alignas(kLine) std::array<uint16_t, kChunkBytes / sizeof(uint16_t)> cast;
  std::byte* to = slot + piece.Offset();
  for (uint64_t row = piece.row; row < piece.row + piece.rows; ++row) {
    const std::byte* from = data + (row * source.stride + piece.column) * width;
    for (uint64_t left = piece.columns, n; left > 0; left -= n) {
      n = std::min<uint64_t>(left, kChunkBytes / written_width);
      const std::byte* bytes = from;
      if (source.from != source.to) {
        const auto* floats = reinterpret_cast<const float*>(from);
        (source.to == DType::kBFloat16 ? ToBFloat16 : ToFloat16)(floats, cast.data(), n);
        bytes = reinterpret_cast<const std::byte*>(cast.data());
      }
      piece.crc = crc32c::Extend(piece.crc, bytes, n * written_width);
      from += n * width;
      Stream(to, bytes, n * written_width, from, width / written_width);
      to += n * written_width;
    }
  }
#if defined(KIMI_STREAMS)
  _mm_sfence();  // No lock or release orders such stores.
#endif
}

// Cuts sources into pieces, in the order of their bytes. A matrix whose rows follow each other
// without a gap counts as one long row.
std::vector<Piece> PiecesOf(std::span<const Source> sources, std::vector<Source>& flat) {
  flat.assign(sources.begin(), sources.end());
  std::vector<Piece> pieces;
  for (Source& source : flat) {
    if (source.stride == source.columns || source.rows == 1) {
      source.stride = source.columns *= source.rows;
      source.rows = 1;
    }
    if (source.Bytes() == 0) continue;
    const uint64_t most = kPieceBytes / SizeOf(source.to);  // Elements of a piece.
    const uint64_t columns = source.rows == 1 ? std::min(most, source.columns) : source.columns;
    const uint64_t rows = std::max<uint64_t>(1, most / columns);
    for (uint64_t row = 0; row < source.rows; row += rows) {
      for (uint64_t column = 0; column < source.columns; column += columns) {
        pieces.push_back({.source = &source,
                          .row = row,
                          .rows = std::min(rows, source.rows - row),
                          .column = column,
                          .columns = std::min(columns, source.columns - column)});
      }
    }
  }
  return pieces;
}

// Joins the checksums of consecutive pieces to the checksums of their regions.
std::vector<uint32_t> Joined(std::span<const Piece> pieces, std::span<const Region> regions) {
  std::vector<uint32_t> crcs;
  auto piece = pieces.begin();
  for (const Region& region : regions) {
    uint32_t crc = 0;
    for (; piece != pieces.end() && piece->Offset() < region.offset + region.bytes; ++piece) {
      crc = crc32c::Join(crc, piece->crc, piece->Bytes());
    }
    crcs.push_back(crc);
  }
  return crcs;
}

}  // namespace

std::vector<uint32_t> CopyAndSum(std::span<const Source> sources, std::span<const Region> regions,
                                 std::byte* slot, unsigned threads) {
  std::vector<Source> flat;
  std::vector<Piece> pieces = PiecesOf(sources, flat);
  Share(pieces.size(), threads, [&](size_t i) { CopyAndSum(pieces[i], slot); });
  return Joined(pieces, regions);
}

std::vector<uint32_t> Sum(std::span<const Region> regions, const std::byte* slot,
                          unsigned threads) {
  std::vector<Source> sources, flat;
  for (const Region& region : regions) {
    // A tensor has an even number of bytes, so 2-byte elements without a cast cover it.
    const uint64_t elements = region.bytes / 2;
    sources.push_back({slot + region.offset, DType::kFloat16, DType::kFloat16, 1, elements,
                       elements, region.offset});
  }
  std::vector<Piece> pieces = PiecesOf(sources, flat);
  Share(pieces.size(), threads, [&](size_t i) {
    Piece& piece = pieces[i];
    piece.crc = crc32c::Extend(0, slot + piece.Offset(), piece.Bytes());
  });
  return Joined(pieces, regions);
}

}  // namespace kimi::weights
