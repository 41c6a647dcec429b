#include "weights/process.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <sstream>
#include <string>

namespace kimi::weights {
namespace {

struct Stat {
  char state;
  uint64_t started;
};

// Parses /proc/PID/stat: "PID (NAME) STATE ...". NAME may contain anything, including parentheses.
// The start time is the 20th field from STATE on.
std::optional<Stat> StatOf(uint32_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  const size_t name_ends = line.rfind(')');
  if (name_ends == std::string::npos) return std::nullopt;
  std::istringstream rest(line.substr(name_ends + 1));
  Stat stat{};
  rest >> stat.state;
  for (int field = 4; field < 22; ++field) rest >> line;
  if (!(rest >> stat.started)) return std::nullopt;
  stat.started &= (uint64_t{1} << 34) - 1;
  return stat;
}

}  // namespace

ProcessId ProcessId::OfThisProcess() {
  const auto pid = static_cast<uint32_t>(getpid());
  const auto stat = StatOf(pid);
  return {.pid = pid, .started = stat ? stat->started : 0};
}

bool ProcessId::IsAlive() const {
  if (kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH) return false;
  const auto stat = StatOf(pid);
  if (!stat) return true;
  return stat->started == started && stat->state != 'Z' && stat->state != 'X';
}

}  // namespace kimi::weights
