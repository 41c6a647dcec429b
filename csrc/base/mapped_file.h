// MappedFile is a whole file in memory, shared with every process that maps it.
//
// What is stored there is in the kernel's page cache at once: it survives the death of the process,
// however it dies, with no call at all. To survive the death of the machine it needs Sync.
//
// Synchronisation: none. Sync and the accessors may be called from any thread.
#ifndef KIMI_BASE_MAPPED_FILE_H_
#define KIMI_BASE_MAPPED_FILE_H_

#include <cstddef>
#include <string>

namespace kimi {

class MappedFile {
 public:
  enum class Mode { kRead, kShare, kWrite };

  // Maps an existing file. kShare may store into it beside the writer. For kWrite it takes the
  // writer's lock, which the kernel releases when the process ends, gives the file all the disk
  // space it needs, and touches every page, so that no later store meets a full disk (which would
  // be a SIGBUS) or waits for a page.
  //
  // Throws std::system_error for what the operating system refuses, std::invalid_argument where
  // another writer has the file.
  MappedFile(const std::string& path, Mode mode);
  ~MappedFile();

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

  // Makes what lies from `offset` on, a multiple of the memory page, read-only in this mapping: a
  // store there is a SIGSEGV. Throws std::system_error.
  void Protect(size_t offset);

  // Bytes of the file at this moment, where another process may have cut it. Touching what is gone
  // is a SIGBUS. Throws std::system_error.
  size_t SizeNow() const;

  // Returns when everything stored before the call is on the disk. Throws std::system_error.
  void Sync() const;

 private:
  void LockForWriting();
  void Map(Mode mode);

  const std::string path_;
  int fd_ = -1;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A file that is written under another name and appears at `path` whole or not at all.
//
//   NewFile file(path, size);
//   file.Write(0, data, n);
//   file.Publish(NewFile::Existing::kReplace);
class NewFile {
 public:
  enum class Existing { kReplace, kRefuse };

  // Creates `path`.tmp with `size` zero bytes, which take no space yet. Throws std::system_error.
  NewFile(const std::string& path, size_t size);
  ~NewFile();  // Removes what was not published.

  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void Write(size_t offset, const void* data, size_t size);

  // Forces the file to disk, gives it its name, and forces the name to disk. kRefuse throws
  // std::system_error with EEXIST where the name is taken.
  void Publish(Existing existing);

 private:
  const std::string path_;
  const std::string partial_;
  int fd_ = -1;
};

// "Cannot <what> <path>", with the system's reason behind it.
[[noreturn]] void ThrowErrno(int error, const std::string& what, const std::string& path);

}  // namespace kimi

#endif  // KIMI_BASE_MAPPED_FILE_H_
