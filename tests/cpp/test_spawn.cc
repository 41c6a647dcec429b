#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <vector>

#include "base/spawn.h"
#include "check.h"

using kimi::Spawn;
using kimi::SpawnOptions;

namespace {

struct Case {
  SpawnOptions options;
  int error;
  const char* step;
};

struct Pipe {
  int ends[2];
  Pipe() { CHECK(pipe2(ends, O_CLOEXEC) == 0); }
};

std::string ReadAll(int fd) {
  std::string text;
  char buffer[256];
  for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) text.append(buffer, n);
  return text;
}

SpawnOptions Shell(const std::string& script, int out) {
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  return {{"/bin/sh", "-c", script}, {null, out, out}, {}, {}, {}};
}

void RunsWithItsDescriptorsAndNoEnvironment() {
  Pipe out, kept, closed;
  SpawnOptions options =
      Shell("echo $HOME-$#; echo kept >&" + std::to_string(kept.ends[1]) + "; (echo x >&" +
                std::to_string(closed.ends[1]) + ") 2>/dev/null; exit 7",
            out.ends[1]);
  options.inherited = {kept.ends[1]};
  const pid_t pid = Spawn(options);
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
  close(out.ends[1]);
  close(kept.ends[1]);
  close(closed.ends[1]);
  CHECK(ReadAll(out.ends[0]) == "-0\n");
  CHECK(ReadAll(kept.ends[0]) == "kept\n");
  CHECK(ReadAll(closed.ends[0]).empty());
}

void NamesTheStepThatFails() {
  Pipe out;
  SpawnOptions missing = Shell("", out.ends[1]);
  missing.argv = {"/no/such/program"};
  SpawnOptions no_cgroup = Shell("", out.ends[1]);
  no_cgroup.cgroup_procs = {out.ends[0]};  // Open for reading only.
  const std::vector<Case> cases = {{missing, ENOENT, "execve"},
                                   {no_cgroup, EBADF, "joining a cgroup"}};
  for (const auto& [options, error, step] : cases) {
    bool thrown = false;
    try {
      Spawn(options);
    } catch (const std::system_error& caught) {
      thrown = true;
      CHECK(caught.code().value() == error);
      CHECK(std::string(caught.what()).find(step) != std::string::npos);
    }
    CHECK(thrown);
    CHECK(waitpid(-1, nullptr, WNOHANG) == -1 && errno == ECHILD);
  }
}

void DiesWithItsParent() {
  Pipe out;
  const pid_t parent = fork();
  CHECK(parent >= 0);
  if (parent == 0) {
    Spawn(Shell("echo started; exec sleep 600", out.ends[1]));
    char byte;
    CHECK(read(out.ends[0], &byte, 1) == 1);
    _exit(0);
  }
  close(out.ends[1]);
  CHECK(waitpid(parent, nullptr, 0) == parent);
  ReadAll(
      out.ends[0]);  // Ends when no process holds the other end, so the sleeping program is dead.
}

}  // namespace

int main() {
  RunsWithItsDescriptorsAndNoEnvironment();
  NamesTheStepThatFails();
  DiesWithItsParent();
  return kimi::test::Failures();
}
