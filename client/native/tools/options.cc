#include "tools/options.h"

#include <sys/random.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <sstream>

#include "base/files.h"
#include "base/hash.h"
#include "session/messages.h"

namespace corolla {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLongestToken = 256;

bool contains(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

double decimal(const std::string& option, const std::string& text, const std::string& expected) {
  char* end = nullptr;
  double value = std::strtod(text.c_str(), &end);
  bool plain = !text.empty() && (std::isdigit(static_cast<unsigned char>(text[0])));
  if (!plain || *end || !std::isfinite(value))
    throw UsageError(option + ": expected " + expected + ", found '" + one_line(text) + "'");
  return value;
}

void check_address(const std::string& text) {
  size_t colon = text.rfind(':');
  bool good = colon != std::string::npos && colon > 0 && colon + 1 < text.size() &&
              text.size() - colon <= 6 && text.find('/') == std::string::npos;
  for (size_t i = colon + 1; good && i < text.size(); ++i) good = text[i] >= '0' && text[i] <= '9';
  if (!good || std::stoi(text.substr(colon + 1)) > 65535)
    throw UsageError("--gateway: expected HOST:PORT, without https://; found '" + one_line(text) +
                     "'");
}

std::string needed(const std::string& option, const fs::path& path) {
  auto text = read_file(path);
  if (!text) throw UsageError(option + ": cannot read " + path.string());
  return *text;
}

// One line; what comes after # is a remark.
std::string read_token(const fs::path& path) {
  std::string line = needed("--token-file", path);
  std::istringstream words(line.substr(0, line.find('#')));
  std::string token, more;
  words >> token >> more;
  bool ascii = std::all_of(token.begin(), token.end(), [](char c) { return c > ' ' && c < 0x7f; });
  if (token.empty() || !more.empty() || token.size() > kLongestToken || !ascii)
    throw UsageError(path.string() + " holds no token: one line, as in the gateway's own file");
  return token;
}

std::string random_name() {
  std::string bytes(8, '\0');
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size()))
    throw Error("this system gives no random numbers");
  return "phone-" + hex(bytes);
}

// A name that is made once.
std::string read_name(const Words& words, const fs::path& state) {
  std::string name = words.text("--name", "");
  if (name.empty()) {
    auto kept = read_file(state / "name");
    name = kept && is_device(*kept) ? *kept : random_name();
    write_file(state / "name", name);
  }
  if (!is_device(name))
    throw UsageError("--name: a device's name has 1 to 64 characters of A-Z a-z 0-9 . _ -");
  return name;
}

std::vector<std::string> read_methods(const Words& words) {
  auto methods = words.list("--methods", "grad,loss");
  for (const auto& method : methods)
    if (method != "grad" && method != "loss")
      throw UsageError("--methods: expected grad, loss or both; found '" + one_line(method) + "'");
  return methods;
}

Pauses read_pauses(const Words& words) {
  Pauses pauses;
  if (!words.has("--retry-seconds")) return pauses;
  auto two = words.list("--retry-seconds", "");
  const char* expected = "FIRST,LONGEST in seconds";
  if (two.size() != 2) decimal("--retry-seconds", "", expected);
  pauses.first = decimal("--retry-seconds", two[0], expected);
  pauses.longest = std::max(pauses.first, decimal("--retry-seconds", two[1], expected));
  return pauses;
}

v1::Policy read_limits(const Words& words) {
  v1::Policy limits;
  limits.set_daily_bytes(words.bytes("--daily-bytes", 0));
  limits.set_daily_seconds(words.positive("--daily-seconds", 0));
  limits.set_daily_battery_percent(words.positive("--daily-battery", 0));
  return limits;
}

}  // namespace

Words::Words(const std::vector<std::string>& words, const std::vector<std::string>& valued,
             const std::vector<std::string>& flags) {
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i].rfind("--", 0) != 0) {
      rest_.push_back(words[i]);
      continue;
    }
    size_t equals = words[i].find('=');
    std::string name = words[i].substr(0, equals);
    bool with_value = equals != std::string::npos;
    if (contains(flags, name) && !with_value) {
      values_[name] = "";
    } else if (!contains(valued, name)) {
      throw UsageError("there is no option " + one_line(words[i]) + ": see corolla-phone --help");
    } else if (with_value) {
      values_[name] = words[i].substr(equals + 1);
    } else if (++i < words.size()) {
      values_[name] = words[i];
    } else {
      throw UsageError(name + " needs a value");
    }
  }
}

std::string Words::text(const std::string& name) const {
  auto found = values_.find(name);
  if (found == values_.end() || found->second.empty())
    throw UsageError(name + " is missing: see corolla-phone --help");
  return found->second;
}

std::string Words::text(const std::string& name, const std::string& usual) const {
  return has(name) ? text(name) : usual;
}

uint64_t Words::number(const std::string& name, uint64_t usual) const {
  if (!has(name)) return usual;
  double value = decimal(name, text(name), "a number");
  if (value != std::floor(value) || value > 1e9)
    throw UsageError(name + ": expected a whole number up to 1000000000, found " + text(name));
  return static_cast<uint64_t>(value);
}

double Words::positive(const std::string& name, double usual) const {
  return has(name) ? decimal(name, text(name), "a number") : usual;
}

uint64_t Words::bytes(const std::string& name, uint64_t usual) const {
  if (!has(name)) return usual;
  static const std::map<std::string, double> units = {
      {"", 1}, {"B", 1}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}};
  std::string size = text(name);
  std::string unit = size.substr(std::min(size.find_first_not_of("0123456789."), size.size()));
  std::string count = size.substr(0, size.size() - unit.size());
  for (char& c : unit) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  const char* expected = "bytes, such as 200MB";
  if (!units.count(unit)) decimal(name, "", expected);
  return static_cast<uint64_t>(std::min(1e18, decimal(name, count, expected) * units.at(unit)));
}

std::vector<std::string> Words::list(const std::string& name, const std::string& usual) const {
  std::vector<std::string> found;
  std::istringstream parts(text(name, usual));
  for (std::string part; std::getline(parts, part, ',');) found.push_back(part);
  return found;
}

Options read_options(const std::vector<std::string>& all) {
  Words words(all,
              {"--gateway", "--token-file", "--root-certificates", "--publisher", "--data",
               "--state", "--name", "--memory", "--methods", "--length", "--platform", "--rounds",
               "--daily-bytes", "--daily-seconds", "--daily-battery", "--run-disk", "--disk",
               "--retry-seconds"},
              {"--once", "--keep-updates"});
  if (!words.rest().empty())
    throw UsageError("there is no command " + one_line(words.rest()[0]) +
                     ": see corolla-phone --help");
  Options options;
  options.gateway = words.text("--gateway");
  check_address(options.gateway);
  options.token = read_token(words.text("--token-file"));
  if (words.has("--root-certificates"))
    options.roots = needed("--root-certificates", words.text("--root-certificates"));
  options.publisher = words.text("--publisher");
  needed("--publisher", options.publisher);
  options.data = words.text("--data");
  options.state = words.text("--state");
  options.methods = read_methods(words);
  options.memory = words.bytes("--memory", 0);
  options.length = static_cast<uint32_t>(words.number("--length", 0));
  options.platform = words.text("--platform", "linux");
  options.rounds = words.number("--rounds", 0);
  options.once = words.has("--once");
  options.keep_updates = words.has("--keep-updates");
  options.limits = read_limits(words);
  options.disk.run = words.bytes("--run-disk", options.disk.run);
  options.disk.all = words.bytes("--disk", options.disk.all);
  options.pauses = read_pauses(words);
  try {
    make_folder(options.state);
    fs::permissions(options.state, fs::perms::owner_all);
    options.name = read_name(words, options.state);
  } catch (const DiskError& error) {
    throw UsageError(std::string("--state: ") + error.what());
  } catch (const fs::filesystem_error& error) {
    throw UsageError("--state " + options.state.string() + ": " + error.code().message());
  }
  return options;
}

const char kUsage[] =
    R"(corolla-phone: trains on this device's own data for a gateway, whenever it asks.

  corolla-phone --gateway HOST:PORT --token-file FILE --publisher publisher.pub
                --data tokens.jsonl --state FOLDER [options]
  corolla-phone check BUNDLE --publisher publisher.pub
  corolla-phone bench BUNDLE --program NAME --method grad|loss --length T --steps N
                [--threads N] [--tokens FILE]

  --root-certificates FILE   ca.pem of the gateway; default: the system's
  --name NAME                default: made once, kept in --state
  --memory SIZE              that it may use, such as 200MB; default: what is free
  --methods grad,loss        default: both
  --length N                 tokens of a sequence, at most
  --platform linux           or script:FILE, conditions by a file, for tests
  --rounds N                 ends after so many updates were accepted; default: never
  --once                     ends after one check-in; fails where no gateway answers in 20 s
  --keep-updates             every reply stays in FOLDER/updates: the aggregation can be checked
  --daily-bytes SIZE         of traffic in 24 hours, at most; as the two that follow
  --daily-seconds N          at work
  --daily-battery PERCENT    of charge spent at work
  --run-disk SIZE            of this device's disk that one run may keep; default: 2GB
  --disk SIZE                that all runs and bundles may keep; default: 8GB
  --retry-seconds A,B        first and longest pause after a call that failed; default: 1,60

Exit codes: 0 done or stopped by a signal, 1 failed, 2 wrong usage.
)";

}  // namespace corolla
