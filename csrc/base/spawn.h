// Starts a program as another user, in a cgroup, and ends it with the calling thread.
//
// As with posix_spawn, the child uses the caller's memory until it runs the program. Nothing is
// copied, which would take a millisecond for a Python process. Unlike with posix_spawn, the child
// can join cgroups, change its user and ask to die with its parent before the program starts.
//
// Synchronisation: the calling thread stops until the program runs; other threads continue.
#ifndef KIMI_BASE_SPAWN_H_
#define KIMI_BASE_SPAWN_H_

#include <sys/types.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace kimi {

struct SpawnOptions {
  std::vector<std::string> argv;  // [0] is the path of the program.
  std::array<int, 3> standard;    // Descriptors that become its stdin, stdout and stderr.
  std::vector<int> inherited;     // Other descriptors that it keeps under the same numbers.
  std::vector<int> cgroup_procs;  // `cgroup.procs` of the cgroups that it joins, open for writing.
  std::optional<uid_t> user;      // Its user, group and only group; no value keeps the caller's.
};

// Starts the program without an environment and returns its pid. The kernel kills it when the
// calling thread ends. Throws std::system_error, which names the step that failed; then there is no
// child.
//
// REQUIRES: `argv` is not empty, and no descriptor of `standard` is 0, 1 or 2.
pid_t Spawn(const SpawnOptions& options);

}  // namespace kimi

#endif  // KIMI_BASE_SPAWN_H_
