#include "session/history.h"

#include <fcntl.h>

#include <chrono>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/files.h"

namespace corolla {
namespace {

using nlohmann::json;

constexpr double kDay = 86400, kOldest = 30 * kDay;
constexpr double kAhead = kDay;  // noted for later than this from now: the clock was wrong then
constexpr uint64_t kMostBytes = 1 << 20;

std::string line_of(const Contribution& one) {
  json line = {{"at", one.at},           {"run", one.run},     {"round", one.round},
               {"seconds", one.seconds}, {"bytes", one.bytes}, {"battery", one.battery},
               {"accepted", one.accepted}};
  return line.dump() + "\n";
}

Contribution parse(const std::string& text) {
  json line = json::parse(text);
  return {line.at("at"),    line.at("run"),     line.at("round"),   line.at("seconds"),
          line.at("bytes"), line.at("battery"), line.at("accepted")};
}

// The last bytes of a file of whatever size.
std::string tail(const std::filesystem::path& path) {
  try {
    File file(path, O_RDONLY);
    std::error_code error;
    uint64_t size = std::filesystem::file_size(path, error);
    return error ? "" : file.read(size > kMostBytes ? size - kMostBytes : 0, kMostBytes);
  } catch (const DiskError&) {
    return "";
  }
}

}  // namespace

Spent spent_today(const std::vector<Contribution>& history, double now) {
  Spent sum;
  for (const auto& past : history) {
    if (past.at <= now - kDay || past.at > now + kAhead) continue;
    sum.bytes += past.bytes;
    sum.seconds += past.seconds;
    sum.battery += past.battery;
  }
  return sum;
}

History::History(std::filesystem::path file) : file_(std::move(file)) {}

std::vector<Contribution> History::read(double now) const {
  std::vector<Contribution> found;
  std::istringstream lines(tail(file_));
  for (std::string line; std::getline(lines, line);) {
    try {
      Contribution one = parse(line);
      if (one.at > now - kOldest) found.push_back(one);
    } catch (const json::exception&) {  // half a line, of a process that was killed
    }
  }
  found.insert(found.end(), unwritten_.begin(), unwritten_.end());
  return found;
}

void History::add(const Contribution& one) {
  unwritten_.push_back(one);
  std::string text;
  // By its age nothing is dropped, the clock may be wrong now; what was noted while it was ahead is
  // taken to be of now, so that it ends as all else does.
  for (auto past : read(-std::numeric_limits<double>::infinity())) {
    if (past.at > one.at + kAhead) past.at = one.at;
    text += line_of(past);
  }
  try {
    write_file(file_, text);
    unwritten_.clear();
  } catch (const DiskError&) {
  }
}

double unix_now() {
  auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

}  // namespace corolla
