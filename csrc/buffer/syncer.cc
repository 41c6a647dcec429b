#include "buffer/syncer.h"

#include <system_error>
#include <utility>

namespace kimi {

Syncer::Syncer(const MappedFile& file, std::chrono::milliseconds interval) : file_(file) {
  if (interval.count() > 0) thread_ = std::thread([this, interval] { Run(interval); });
}

Syncer::~Syncer() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_one();
  thread_.join();
}

void Syncer::Flush() {
  file_.Sync();
  const std::lock_guard lock(mutex_);
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Syncer::Run(std::chrono::milliseconds interval) {
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, interval, [this] { return stopping_; })) {
    lock.unlock();
    std::exception_ptr failure;
    try {
      file_.Sync();
    } catch (const std::system_error&) {
      failure = std::current_exception();
    }
    lock.lock();
    if (failure) failure_ = failure;
  }
}

}  // namespace kimi
