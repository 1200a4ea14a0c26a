// Linux: what /sys and /proc tell.
//   battery   /sys/class/power_supply: of devices of type Battery with a capacity
//   thermal   /sys/class/thermal: how each zone stands to its own trip points
//   memory    MemAvailable, and the limits of the control groups that the process is in
//   metered   whether the default route goes through a mobile modem (wwan, ppp, rmnet); a network
//             manager knows more, but speaks D-Bus
//   idle      whether no terminal was used in the last five minutes; a desktop without terminals
//             counts as idle
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "base/platform.h"

namespace corolla {
namespace {

namespace fs = std::filesystem;

constexpr double kIdleSeconds = 300;
constexpr int64_t kNoLimit = int64_t{1} << 60;  // version 1 of control groups writes a huge number

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// -1 where there is no number.
int64_t number(const fs::path& path) {
  std::string text = first_line(path);
  char* end = nullptr;
  int64_t value = std::strtoll(text.c_str(), &end, 10);
  return text.empty() || *end ? -1 : value;
}

std::vector<fs::path> entries(const fs::path& folder) {
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error))
    found.push_back(at->path());
  return found;
}

void read_battery(Readings& now) {
  for (const auto& supply : entries("/sys/class/power_supply")) {
    int64_t percent = number(supply / "capacity");
    bool whole_device = first_line(supply / "scope") != "Device";  // not that of a mouse
    if (first_line(supply / "type") != "Battery" || percent < 0 || !whole_device) continue;
    std::string status = first_line(supply / "status");
    now.battery_percent = static_cast<uint32_t>(std::min<int64_t>(percent, 100));
    now.charging = status == "Charging" || status == "Full" || status == "Not charging";
    return;
  }
}

// A passive trip point is where the kernel begins to throttle: "severe" to Android.
uint32_t severity(const fs::path& zone) {
  int64_t temperature = number(zone / "temp");
  uint32_t level = 0;
  for (int i = 0; i < 16; ++i) {
    std::string trip = "trip_point_" + std::to_string(i);
    std::string type = first_line(zone / (trip + "_type"));
    if (type.empty()) break;
    int64_t from = number(zone / (trip + "_temp"));
    if (from <= 0 || temperature < from - 5000) continue;  // thousandths of a degree
    bool reached = temperature >= from;
    if (type == "passive") level = std::max(level, reached ? 3U : 1U);
    if (type == "hot" && reached) level = std::max(level, 4U);
    if (type == "critical" && reached) level = std::max(level, 6U);
  }
  return level;
}

uint32_t read_thermal() {
  uint32_t level = 0;
  for (const auto& zone : entries("/sys/class/thermal"))
    if (zone.filename().string().rfind("thermal_zone", 0) == 0)
      level = std::max(level, severity(zone));
  return level;
}

bool read_metered() {
  std::ifstream routes("/proc/net/route");
  std::string line;
  while (std::getline(routes, line)) {
    std::istringstream fields(line);
    std::string device, destination;
    fields >> device >> destination;
    if (destination != "00000000") continue;
    for (const char* modem : {"wwan", "ppp", "rmnet"})
      if (device.rfind(modem, 0) == 0) return true;
  }
  return false;
}

bool read_idle() {
  double now = static_cast<double>(std::time(nullptr));
  auto terminals = entries("/dev/pts");
  for (int i = 1; i <= 6; ++i) terminals.push_back("/dev/tty" + std::to_string(i));
  for (const auto& terminal : terminals) {
    struct stat facts{};
    bool numbered = terminal.filename() != "ptmx" && ::stat(terminal.c_str(), &facts) == 0;
    if (numbered && now - static_cast<double>(facts.st_atime) < kIdleSeconds) return false;
  }
  return true;
}

int64_t available_memory() {
  std::ifstream facts("/proc/meminfo");
  std::string name;
  int64_t kilobytes = 0;
  while (facts >> name >> kilobytes) {
    if (name == "MemAvailable:") return kilobytes * 1024;
    facts.ignore(64, '\n');
  }
  return 0;
}

// Of files in the page cache, which give way.
int64_t inactive(const fs::path& group, const char* name) {
  std::ifstream facts(group / "memory.stat");
  std::string key;
  int64_t value = 0;
  while (facts >> key >> value)
    if (key == name) return value;
  return 0;
}

// Of one control group: what its limit leaves.
int64_t left_in(const fs::path& group, bool second_version) {
  int64_t limit = number(group / (second_version ? "memory.max" : "memory.limit_in_bytes"));
  int64_t used = number(group / (second_version ? "memory.current" : "memory.usage_in_bytes"));
  if (limit < 0 || limit >= kNoLimit || used < 0) return kNoLimit;
  return limit - used + inactive(group, second_version ? "inactive_file" : "total_inactive_file");
}

int64_t left_in_groups() {
  int64_t least = kNoLimit;
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line)) {  // "0::/path" or "7:memory:/path"
    size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string kind = line.substr(first + 1, second - first - 1);
    if (!kind.empty() && kind.find("memory") == std::string::npos) continue;
    fs::path root = kind.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    fs::path own = line.substr(second + 1);
    for (fs::path inner = root / own.relative_path();; inner = inner.parent_path()) {
      least = std::min(least, left_in(inner, kind.empty()));
      if (inner == root || inner.native().size() <= root.native().size()) break;
    }
  }
  return least;
}

uint64_t read_storage(const fs::path& folder) {
  struct statvfs facts{};
  if (::statvfs(folder.c_str(), &facts) < 0) return 0;
  return static_cast<uint64_t>(facts.f_bavail) * facts.f_frsize;
}

class Linux : public Platform {
 public:
  explicit Linux(fs::path state) : state_(std::move(state)) {}

  Readings read() override {
    Readings now;
    read_battery(now);
    now.thermal = read_thermal();
    now.metered = read_metered();
    now.idle = read_idle();
    now.storage_bytes = read_storage(state_);
    int64_t memory = std::min(available_memory(), left_in_groups());
    now.memory_bytes = static_cast<uint64_t>(std::max<int64_t>(0, memory));
    return now;
  }

 private:
  fs::path state_;
};

}  // namespace

std::unique_ptr<Platform> linux_platform(const fs::path& state) {
  return std::make_unique<Linux>(state);
}

}  // namespace corolla
