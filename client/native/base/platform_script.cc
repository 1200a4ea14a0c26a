#include <chrono>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.h"
#include "base/files.h"
#include "base/platform.h"

namespace corolla {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

template <class T>
void take(const json& line, const char* name, T& value) {
  if (auto found = line.find(name); found != line.end()) value = found->get<T>();
}

void fill(const json& line, Readings& now) {
  take(line, "charging", now.charging);
  take(line, "battery_percent", now.battery_percent);
  take(line, "thermal", now.thermal);
  take(line, "metered", now.metered);
  take(line, "idle", now.idle);
  take(line, "storage_bytes", now.storage_bytes);
  take(line, "memory_bytes", now.memory_bytes);
}

std::vector<json> parse(const fs::path& file) {
  auto text = read_file(file);
  if (!text) throw Error("cannot read " + file.string());
  std::vector<json> lines;
  std::istringstream input(*text);
  int number = 0;
  for (std::string line; std::getline(input, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      Readings checked;
      lines.push_back(json::parse(line));
      fill(lines.back(), checked);
      lines.back().at("after").get<double>();
    } catch (const json::exception&) {
      throw Error(file.string() + ", line " + std::to_string(number) +
                  R"(: expected {"after": seconds, "charging": true, ...})");
    }
  }
  return lines;
}

class Script : public Platform {
 public:
  Script(fs::path file, const fs::path& state)
      : file_(std::move(file)), machine_(linux_platform(state)), start_(Clock::now()) {
    std::error_code error;
    changed_ = fs::last_write_time(file_, error);
    lines_ = parse(file_);
  }

  Readings read() override {
    refresh();
    Readings now, found = machine_->read();
    now.storage_bytes = found.storage_bytes;
    now.memory_bytes = found.memory_bytes;
    double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
    for (const auto& line : lines_)
      if (elapsed >= line["after"].get<double>()) fill(line, now);
    return now;
  }

 private:
  // A file that is half written is read the next time.
  void refresh() {
    std::error_code error;
    auto changed = fs::last_write_time(file_, error);
    if (error || changed == changed_) return;
    try {
      lines_ = parse(file_);
      changed_ = changed;
    } catch (const Error&) {
    }
  }

  fs::path file_;
  std::unique_ptr<Platform> machine_;
  Clock::time_point start_;
  fs::file_time_type changed_;
  std::vector<json> lines_;
};

}  // namespace

std::unique_ptr<Platform> script_platform(const fs::path& file, const fs::path& state) {
  return std::make_unique<Script>(file, state);
}

}  // namespace corolla
