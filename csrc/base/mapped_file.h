// MappedFile maps a whole file into memory and shares it with every process that maps it.
//
// The file may grow while it is mapped. Each process reserves addresses for its greatest size;
// bytes that the file gains appear there in all of them, without a further call.
//
// A store is in the kernel's page cache at once. It survives the death of the process by any cause,
// without a further call. Surviving the death of the machine takes a call of Sync.
//
// Synchronisation: none. SizeNow, Sync and the accessors may be called from any thread.
#ifndef KIMI_BASE_MAPPED_FILE_H_
#define KIMI_BASE_MAPPED_FILE_H_

#include <cstddef>
#include <string>

namespace kimi {

class MappedFile {
 public:
  enum class Mode { kRead, kShare, kWrite };

  // Maps an existing file. kShare allows stores while another process is the writer. kWrite takes
  // the writer's lock, which the kernel releases when the process ends. It also allocates the disk
  // space and populates every page: no later store meets a full disk (a SIGBUS) or waits for a
  // page. Throws std::system_error if the operating system refuses a step, and
  // std::invalid_argument if another writer has the file.
  MappedFile(const std::string& path, Mode mode);
  ~MappedFile();

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }  // Of the mapping, in bytes.
  const std::string& path() const { return path_; }

  // Extends the mapping to `bytes`, past the end of the file. Touching a byte there is a SIGBUS
  // until the file has grown so far. Moves data(). Throws std::system_error. REQUIRES: the file is
  // not empty, and no other thread uses the mapping.
  void Reserve(size_t bytes);

  // Lengthens the file from `from` to `to` bytes. The new part is allocated and populated as on
  // opening. Throws std::system_error if the disk is full; the file then ends at `from`.
  // REQUIRES: the mode is kWrite, nobody uses bytes from `from` on, and to <= size().
  void Grow(size_t from, size_t to);

  // Makes the bytes from `offset` on read-only in this mapping; a store there is a SIGSEGV. Throws
  // std::system_error. REQUIRES: `offset` is a multiple of the memory page.
  void Protect(size_t offset);

  // The present size of the file in bytes; another process may have truncated it. Touching
  // truncated bytes is a SIGBUS. Throws std::system_error.
  size_t SizeNow() const;

  // Returns when everything stored before the call is on disk. Throws std::system_error.
  void Sync() const;

 private:
  void LockForWriting();
  void Map(Mode mode);
  [[noreturn]] void ThrowFull(int error, size_t from, size_t to) const;

  const std::string path_;
  int fd_ = -1;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A file that is written under a temporary name and appears at `path` as a whole or not at all.
//
//   NewFile file(path, size);
//   file.Write(0, data, n);
//   file.Publish(NewFile::Existing::kReplace);
class NewFile {
 public:
  enum class Existing { kReplace, kRefuse };

  // Creates `path`.tmp with `size` zero bytes, which take no disk space. Throws std::system_error.
  NewFile(const std::string& path, size_t size);
  ~NewFile();  // Removes the file if it was not published.

  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void Write(size_t offset, const void* data, size_t size);

  // Forces the file to disk, renames it to `path`, and forces the folder to disk. kRefuse throws
  // std::system_error with EEXIST if `path` exists.
  void Publish(Existing existing);

 private:
  const std::string path_;
  const std::string partial_;
  int fd_ = -1;
};

// Throws std::system_error with "Cannot <what> <path>" and the reason of the system.
[[noreturn]] void ThrowErrno(int error, const std::string& what, const std::string& path);

}  // namespace kimi

#endif  // KIMI_BASE_MAPPED_FILE_H_
