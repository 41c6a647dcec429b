// Starting a program as another user, in a cgroup, bound to the life of the caller.
//
// Like posix_spawn, and for its reason: the child borrows the caller's memory until it runs the
// program, so nothing is copied, which for a Python process takes a millisecond. Unlike it, the
// child can join cgroups, change its user and ask to die with its parent before the program begins.
//
// Synchronisation: the calling thread is stopped until the program runs; others go on.
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
  std::array<int, 3> standard;    // What becomes its stdin, stdout and stderr.
  std::vector<int> inherited;     // Other descriptors that it keeps, by the same numbers.
  std::vector<int> cgroup_procs;  // Open for writing: the cgroups that it is in.
  std::optional<uid_t> user;      // Its user, group and only group; none: the caller's.
};

// Start it, with no environment. The kernel kills it when the calling thread ends.
//
// REQUIRES: `argv` is not empty, and no descriptor of `standard` is 0, 1 or 2.
// Throws std::system_error, which names the step; then there is no child.
pid_t Spawn(const SpawnOptions& options);

}  // namespace kimi

#endif  // KIMI_BASE_SPAWN_H_
