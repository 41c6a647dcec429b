#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <stdexcept>
#include <system_error>

namespace kimi {
namespace {

constexpr size_t kMemoryPage = 4096;

int OpenOrThrow(const std::string& path, int flags, const std::string& what) {
  const int fd = open(path.c_str(), flags | O_CLOEXEC, 0644);
  if (fd < 0) ThrowErrno(errno, what, path);
  return fd;
}

void SyncFolderOf(const std::string& path) {
  const auto folder = std::filesystem::absolute(path).parent_path().string();
  const int fd = OpenOrThrow(folder, O_RDONLY | O_DIRECTORY, "open");
  const int error = fsync(fd) == 0 ? 0 : errno;
  close(fd);
  if (error) ThrowErrno(error, "force to disk", folder);
}

// Allocates disk space for bytes [from, to) of a file, which may be past its end. Returns the
// number of an error, or 0.
int Allocate(int fd, size_t from, size_t to) {
  int error = 0;
  do {
    error = posix_fallocate(fd, static_cast<off_t>(from), static_cast<off_t>(to - from));
  } while (error == EINTR);
  return error;
}

// Writes zeros to bytes [from, to). The kernel then keeps them in larger blocks than if each page
// came with its first touch: appends are a quarter faster, and reads a tenth. Returns the number of
// an error, or 0.
int WriteZeros(int fd, size_t from, size_t to) {
  static const std::byte zeros[1 << 20] = {};
  while (from < to) {
    const size_t n = std::min(sizeof(zeros), to - from);
    const ssize_t written = pwrite(fd, zeros, n, static_cast<off_t>(from));
    if (written < 0 && errno != EINTR) return errno;
    if (written > 0) from += static_cast<size_t>(written);
  }
  return 0;
}

// Makes all memory pages writable, so that no later store waits for one or is a SIGBUS. Returns the
// number of an error, or 0. `data` begins at a memory page.
int Populate(std::byte* data, size_t size) {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack.
  int error = 0;
  do {
    error = madvise(data, size, kPopulateWrite) == 0 ? 0 : errno;
  } while (error == EINTR || error == EAGAIN);
  // A store would be a SIGBUS: a disk that copies shared blocks on a write has no space for a copy.
  if (error == EFAULT) return ENOSPC;
  if (error != EINVAL) return error;
  // Linux before 5.14: rewrite a byte of each page with its own value.
  for (size_t at = 0; at < size; at += kMemoryPage) {
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(data + at), 0, __ATOMIC_RELAXED);
  }
  return 0;
}

}  // namespace

void ThrowErrno(int error, const std::string& what, const std::string& path) {
  throw std::system_error(error, std::generic_category(), "Cannot " + what + " " + path);
}

MappedFile::MappedFile(const std::string& path, Mode mode) : path_(path) {
  fd_ = OpenOrThrow(path, mode == Mode::kRead ? O_RDONLY : O_RDWR, "open");
  try {
    if (mode == Mode::kWrite) LockForWriting();
    Map(mode);
  } catch (...) {  // The destructor does not run after a constructor that throws.
    close(fd_);
    throw;
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
  close(fd_);
}

void MappedFile::LockForWriting() {
  if (flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
  if (errno != EWOULDBLOCK) ThrowErrno(errno, "lock", path_);
  throw std::invalid_argument(path_ +
                              " is open for writing already: close it there, stop that process, "
                              "or open it here with readonly=True");
}

void MappedFile::Map(Mode mode) {
  size_ = SizeNow();
  if (size_ == 0) return;  // An empty file cannot be mapped; the caller checks the size.
  const int access = mode == Mode::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
  void* data = mmap(nullptr, size_, access, MAP_SHARED, fd_, 0);
  if (data == MAP_FAILED) ThrowErrno(errno, "map", path_);
  data_ = static_cast<std::byte*>(data);
  if (mode != Mode::kWrite) return;
  int error = Allocate(fd_, 0, size_);
  if (error == 0) error = Populate(data_, size_);
  if (error == 0) return;
  munmap(data_, size_);
  ThrowFull(error, 0, size_);
}

void MappedFile::ThrowFull(int error, size_t from, size_t to) const {
  struct statvfs disk;
  const bool measured = fstatvfs(fd_, &disk) == 0;
  const std::string free = measured ? std::to_string(disk.f_bavail * disk.f_frsize) : "unknown";
  ThrowErrno(error,
             "allocate bytes " + std::to_string(from) + " to " + std::to_string(to) + " (" + free +
                 " bytes are free on the disk: free some, or use a larger disk) for",
             path_);
}

void MappedFile::Reserve(size_t bytes) {
  if (bytes <= size_) return;
  void* data = mremap(data_, size_, bytes, MREMAP_MAYMOVE);
  if (data == MAP_FAILED) {
    ThrowErrno(errno, "reserve " + std::to_string(bytes) + " bytes of address space for", path_);
  }
  data_ = static_cast<std::byte*>(data);
  size_ = bytes;
}

void MappedFile::Grow(size_t from, size_t to) {
  const size_t page = from / kMemoryPage * kMemoryPage;
  int error = Allocate(fd_, from, to);
  if (error == 0) error = WriteZeros(fd_, from, to);
  if (error == 0) error = Populate(data_ + page, to - page);
  if (error == 0) return;
  // A part may have been allocated. It goes back to the disk.
  if (ftruncate(fd_, static_cast<off_t>(from)) != 0) ThrowErrno(errno, "shorten", path_);
  ThrowFull(error, from, to);
}

void MappedFile::Protect(size_t offset) {
  if (offset >= size_) return;
  if (mprotect(data_ + offset, size_ - offset, PROT_READ) != 0) {
    ThrowErrno(errno, "protect", path_);
  }
}

size_t MappedFile::SizeNow() const {
  struct stat info;
  if (fstat(fd_, &info) != 0) ThrowErrno(errno, "measure", path_);
  return static_cast<size_t>(info.st_size);
}

void MappedFile::Sync() const {
  // On Linux fdatasync includes pages that were changed through a mapping.
  if (fdatasync(fd_) != 0) ThrowErrno(errno, "force to disk", path_);
}

NewFile::NewFile(const std::string& path, size_t size) : path_(path), partial_(path + ".tmp") {
  fd_ = OpenOrThrow(partial_, O_RDWR | O_CREAT | O_TRUNC, "create");
  if (ftruncate(fd_, static_cast<off_t>(size)) != 0) {
    const int error = errno;
    close(fd_);
    unlink(partial_.c_str());
    ThrowErrno(error, "give " + std::to_string(size) + " bytes to", partial_);
  }
}

NewFile::~NewFile() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(partial_.c_str());
}

void NewFile::Write(size_t offset, const void* data, size_t size) {
  auto bytes = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = pwrite(fd_, bytes, size, static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) ThrowErrno(errno, "write", partial_);
    bytes += written;
    offset += static_cast<size_t>(written);
    size -= static_cast<size_t>(written);
  }
}

void NewFile::Publish(Existing existing) {
  if (fsync(fd_) != 0) ThrowErrno(errno, "force to disk", partial_);
  if (existing == Existing::kReplace) {
    if (rename(partial_.c_str(), path_.c_str()) != 0) ThrowErrno(errno, "rename to", path_);
  } else {  // Unlike a rename, a hard link refuses a name that exists.
    if (link(partial_.c_str(), path_.c_str()) != 0) ThrowErrno(errno, "create", path_);
    unlink(partial_.c_str());
  }
  close(fd_);
  fd_ = -1;
  SyncFolderOf(path_);
}

}  // namespace kimi
