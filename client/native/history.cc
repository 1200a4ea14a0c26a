#include "history.h"

#include <fcntl.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <sstream>

#include "files.h"

namespace corolla {
namespace {

using nlohmann::json;

constexpr double kDay = 86400, kOldest = 30 * kDay;
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
    if (past.at <= now - kDay) continue;
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
  return found;
}

void History::add(const Contribution& one) const {
  std::string text;
  for (const auto& past : read(one.at)) text += line_of(past);
  write_file(file_, text + line_of(one));
}

double unix_now() {
  auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

}  // namespace corolla
