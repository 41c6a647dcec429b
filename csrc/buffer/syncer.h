// Syncer forces a mapped file to disk, when asked and, if it has an interval, by itself.
//
// Synchronisation: any thread may call Flush. The appends that it makes durable take no lock and do
// not wait for it.
#ifndef KIMI_BUFFER_SYNCER_H_
#define KIMI_BUFFER_SYNCER_H_

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "base/mapped_file.h"

namespace kimi {

class Syncer {
 public:
  // An interval of 0 starts no thread. REQUIRES: `file` outlives this.
  Syncer(const MappedFile& file, std::chrono::milliseconds interval);
  ~Syncer();  // Ends the thread; does not flush.

  Syncer(const Syncer&) = delete;
  Syncer& operator=(const Syncer&) = delete;

  // Returns when all that was stored before the call is on disk. Throws std::system_error, also
  // where that has failed in the background since the last call: such data may be lost for good.
  void Flush();

 private:
  void Run(std::chrono::milliseconds interval);

  const MappedFile& file_;
  std::mutex mutex_;  // Guards the next two.
  bool stopping_ = false;
  std::exception_ptr failure_;
  std::condition_variable stop_;
  std::thread thread_;
};

}  // namespace kimi

#endif  // KIMI_BUFFER_SYNCER_H_
