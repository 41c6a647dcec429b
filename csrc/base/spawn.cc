#include "base/spawn.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>

namespace kimi {
namespace {

constexpr size_t kStackBytes = 64 << 10;

// Shared by parent and child, in the parent's memory.
struct Shared {
  const SpawnOptions* options;
  char* const* argv;
  pid_t parent;
  sigset_t mask;
  const char* failed = nullptr;
  int error = 0;
};

// Calls the kernel directly. The functions of glibc would also change the user of the parent's
// threads, because the child shares their memory.
bool Become(uid_t user) {
  return syscall(SYS_setgroups, 0, nullptr) == 0 && syscall(SYS_setresgid, user, user, user) == 0 &&
         syscall(SYS_setresuid, user, user, user) == 0;
}

// Returns only if a step fails, with the name of that step.
const char* Prepare(const Shared& shared) {
  const SpawnOptions& options = *shared.options;
  for (int target = 0; target < 3; ++target) {
    if (dup2(options.standard[static_cast<size_t>(target)], target) < 0) return "dup2";
  }
  for (const int fd : options.inherited) {
    if (fcntl(fd, F_SETFD, 0) != 0) return "fcntl";
  }
  for (const int fd : options.cgroup_procs) {
    if (write(fd, "0", 1) != 1) return "joining a cgroup";
  }
  if (options.user && !Become(*options.user)) return "changing the user";
  // Comes after the change of user, which would undo it.
  if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0) return "prctl";
  if (syscall(SYS_getppid) != shared.parent) {  // The parent has died already.
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  }
  // A signal handler of the parent must not run here, because it would change the parent's memory.
  for (int number = 1; number < NSIG; ++number) {
    struct sigaction action;
    if (sigaction(number, nullptr, &action) == 0 && action.sa_handler != SIG_IGN &&
        action.sa_handler != SIG_DFL) {
      action.sa_handler = SIG_DFL;
      action.sa_flags = 0;
      sigaction(number, &action, nullptr);
    }
  }
  sigprocmask(SIG_SETMASK, &shared.mask, nullptr);
  char* const no_environment[] = {nullptr};
  execve(shared.argv[0], shared.argv, no_environment);
  return "execve";
}

int Child(void* argument) {
  auto* shared = static_cast<Shared*>(argument);
  shared->failed = Prepare(*shared);
  shared->error = errno;
  _exit(127);
}

}  // namespace

pid_t Spawn(const SpawnOptions& options) {
  std::vector<char*> argv;
  argv.reserve(options.argv.size() + 1);
  for (const std::string& word : options.argv) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const auto stack = std::make_unique<char[]>(kStackBytes);
  Shared shared{&options, argv.data(), getpid(), {}};
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &shared.mask);
  const pid_t pid =
      clone(Child, stack.get() + kStackBytes, CLONE_VM | CLONE_VFORK | SIGCHLD, &shared);
  const int error = errno;
  pthread_sigmask(SIG_SETMASK, &shared.mask, nullptr);
  if (pid < 0) throw std::system_error(error, std::generic_category(), "clone");
  if (shared.failed != nullptr) {
    waitpid(pid, nullptr, 0);
    throw std::system_error(shared.error, std::generic_category(), shared.failed);
  }
  return pid;
}

}  // namespace kimi
