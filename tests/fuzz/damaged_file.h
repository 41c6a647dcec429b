// A sound file to which a fuzzer's bytes are applied as damage.
//
// The bytes are a list of edits, so a few of them reach any place of a file of many kilobytes:
//
//   kind | place (4 bytes) | count | `count` further bytes
//
// Besides overwriting, flipping, cutting and copying, an edit may renew the checksum byte of a
// sealed word or the checksum of a header. Edits after that get past the first check.
#ifndef KIMI_TESTS_FUZZ_DAMAGED_FILE_H_
#define KIMI_TESTS_FUZZ_DAMAGED_FILE_H_

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>

#include "base/crc32c.h"
#include "base/sealed.h"

namespace kimi::fuzz {

// Checks that a fuzz target makes end the process, as a crash does.
inline void Require(bool holds) {
  if (!holds) __builtin_trap();
}

// A path in memory that no other process uses.
inline std::string PathFor(const char* name) {
  const auto folder = std::filesystem::exists("/dev/shm") ? std::filesystem::path("/dev/shm")
                                                          : std::filesystem::temp_directory_path();
  return (folder / ("kimi-fuzz-" + std::to_string(getpid()) + name)).string();
}

// Whether an edit wrote a checksum, so that damage may pass for sound.
struct Damaged {
  std::string contents;
  bool resealed = false;
};

// `header_crc_at`: where the CRC32C of all header bytes before it is.
inline Damaged Damage(std::string contents, const uint8_t* data, size_t size,
                      size_t header_crc_at) {
  Damaged result{std::move(contents)};
  std::string& file = result.contents;
  while (size >= 6 && !file.empty()) {
    uint32_t place;
    std::memcpy(&place, data + 1, sizeof(place));
    const uint8_t kind = data[0] % 8;
    const size_t at = place % file.size(), count = std::min<size_t>(data[5], size - 6);
    const uint8_t* bytes = data + 6;
    if (kind < 3) {  // Overwrite.
      std::memcpy(file.data() + at, bytes, std::min(count, file.size() - at));
    } else if (kind == 3 && count > 0) {  // Flip.
      file[at] = static_cast<char>(file[at] ^ bytes[0]);
    } else if (kind == 4 && count >= 4) {  // Copy 512 bytes, the size of a slot, from elsewhere.
      uint32_t from;
      std::memcpy(&from, bytes, sizeof(from));
      const size_t start = from % file.size();
      const size_t length = std::min({size_t{512}, file.size() - at, file.size() - start});
      std::memmove(file.data() + at, file.data() + start, length);
    } else if (kind == 5) {  // Cut.
      file.resize(at);
    } else if (kind == 6 && file.size() >= 8) {  // Renew the checksum byte of a word.
      const size_t aligned = at / 8 * 8;
      if (aligned + 8 <= file.size()) {
        uint64_t word;
        std::memcpy(&word, file.data() + aligned, sizeof(word));
        word = Seal(word & ((uint64_t{1} << kSealedBits) - 1));
        std::memcpy(file.data() + aligned, &word, sizeof(word));
        result.resealed = true;
      }
    } else if (kind == 7 && file.size() >= header_crc_at + 4) {
      const uint32_t crc = crc32c::Extend(0, file.data(), header_crc_at);
      std::memcpy(file.data() + header_crc_at, &crc, sizeof(crc));
      result.resealed = true;
    }
    data += 6 + count;
    size -= 6 + count;
  }
  return result;
}

}  // namespace kimi::fuzz

#endif  // KIMI_TESTS_FUZZ_DAMAGED_FILE_H_
