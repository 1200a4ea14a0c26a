// The client with a trainer that does what a test says, and a judge of policies: no runtime.
//
//   corolla-phone-stub <options of corolla-phone>    STUB (environment): a file of JSON
//       {"passes": 3, "seconds": 0.01, "payload": "FILE", "error": "", "missing": []}
//   corolla-phone-stub policies tests/policy_cases.json    what each case finds, a line of JSON each
//   corolla-phone-stub bundle FOLDER PUBLISHER             reads and verifies a bundle
//   corolla-phone-stub history FILE COUNT                  adds so many lines to a history
//   corolla-phone-stub senses FOLDER                       what the platform linux finds
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/files.h"
#include "base/hash.h"
#include "tools/serve.h"

namespace corolla {
namespace {

using nlohmann::json;
using Strings = std::vector<std::string>;

json scripted() {
  const char* file = std::getenv("STUB");
  auto text = read_file(file ? file : "");
  return text ? json::parse(*text) : json::object();
}

class Stub : public Worker {
 public:
  explicit Stub(std::filesystem::path state) : state_(std::move(state)) {}

  Strings missing(const std::string&, const std::map<std::string, std::string>& groups) override {
    Strings names;
    for (const auto& [name, content] : groups) names.push_back(name);
    return names;
  }

  // Counts passes in a file as a trainer keeps a checkpoint.
  Answer answer(const std::string& client, const v1::Task& task, const std::string& payload,
                const Strings& groups, const Assignment& assignment,
                Conditions& conditions) override {
    json script = scripted();
    auto checkpoint = state_ / "passes";
    int done = std::atoi(read_file(checkpoint).value_or("0").c_str());
    note({{"from", done}, {"payload", payload.size()}, {"groups", groups.size()},
          {"program", assignment.program}, {"method", assignment.method},
          {"length", assignment.length}});
    for (int last = script.value("passes", 1); done < last;) {
      std::this_thread::sleep_for(std::chrono::duration<double>(script.value("seconds", 0.01)));
      write_file(checkpoint, std::to_string(++done));
      if (auto why = conditions.lapsed(); !why.empty()) throw Lapsed(why);
    }
    std::filesystem::remove(checkpoint);
    return reply(client, task, script);
  }

 private:
  static Answer reply(const std::string& client, const v1::Task& task, const json& script) {
    Answer answer;
    if (auto file = script.value("payload", ""); !file.empty())
      answer.payload = read_file(file, 1 << 30).value();
    v1::Reply& head = answer.header;
    head.set_schema(task.schema());
    head.set_run_id(task.run_id());
    head.set_round(task.round());
    head.set_base_version(task.base_version());
    head.set_kind(task.kind());
    head.set_client(client);
    head.set_num_examples(3);
    head.set_payload_bytes(answer.payload.size());
    head.set_payload_sha256(sha256(answer.payload));
    head.set_error(script.value("error", ""));
    for (const auto& name : script.value("missing", Strings{})) head.add_missing(name);
    return answer;
  }

  void note(const json& line) const {
    std::ofstream(state_ / "stub.log", std::ios::app) << line.dump() << "\n";
  }

  std::filesystem::path state_;
};

uint64_t lines_in(const std::filesystem::path& file) {
  auto text = read_file(file);
  if (!text) throw UsageError("--data: cannot read " + file.string());
  return static_cast<uint64_t>(std::count(text->begin(), text->end(), '\n'));
}

// JSON has no word for what is no number: there it is a text.
double number(const json& told, const char* name) {
  auto found = told.find(name);
  if (found == told.end()) return 0.0;
  return found->is_string() ? std::stod(found->get<std::string>()) : found->get<double>();
}

v1::Policy policy_of(const json& told) {
  v1::Policy policy;
  policy.set_charging(told.value("charging", false));
  policy.set_unmetered(told.value("unmetered", false));
  policy.set_idle(told.value("idle", false));
  policy.set_battery_percent(told.value("battery_percent", 0U));
  policy.set_thermal(told.value("thermal", 0U));
  policy.set_storage_bytes(told.value("storage_bytes", uint64_t{0}));
  policy.set_examples(told.value("examples", uint64_t{0}));
  policy.set_separation(told.value("separation", 0U));
  policy.set_period_seconds(told.value("period_seconds", 0.0));
  policy.set_daily_bytes(told.value("daily_bytes", uint64_t{0}));
  policy.set_daily_seconds(number(told, "daily_seconds"));
  policy.set_daily_battery_percent(number(told, "daily_battery_percent"));
  return policy;
}

Readings readings_of(const json& device) {
  return {device.at("charging"), device.at("battery_percent"), device.at("thermal"),
          device.at("metered"),  device.at("idle"),            device.at("storage_bytes"), 0};
}

// The history goes through its file: what is too old or cannot be read is dropped there.
std::vector<Contribution> history_of(const json& lines, double now) {
  auto file = std::filesystem::temp_directory_path() /
              ("corolla-history-" + std::to_string(::getpid()));
  std::string text;
  for (const auto& line : lines)
    text += (line.is_string() ? line.get<std::string>() : line.dump()) + "\n";
  write_file(file, text);
  auto found = History(file).read(now);
  std::filesystem::remove(file);
  return found;
}

json judged(const json& one, double now) {
  auto policy = stricter(policy_of(one.at("policy")), policy_of(one.at("owner")));
  auto device = readings_of(one.at("device"));
  auto history = history_of(one.at("history"), now);
  Spent today = spent_today(history, now), working = today;
  working.bytes += one.at("session").at("bytes").get<double>();
  working.seconds += one.at("session").at("seconds").get<double>();
  working.battery += one.at("session").at("battery").get<double>();
  return {{"start", before_check_in(policy, device, one.at("examples"), today)},
          {"lease", with_lease(policy, history, one.at("run"), one.at("round"), now)},
          {"working", while_training(policy, device, working)}};
}

void policies(const std::string& file) {
  json all = json::parse(read_file(file).value());
  for (const auto& one : all.at("cases")) {
    json found = {{"name", one.at("name")}, {"found", judged(one, all.at("now"))}};
    std::printf("%s\n", found.dump().c_str());
  }
}

void bundle(const Strings& words) {
  Manifest manifest = read_bundle(words.at(1), words.at(2));
  Strings names;
  for (const auto& [name, facts] : manifest.files) names.push_back(name);
  verify_files(manifest, words[1], names);
  json found = {{"model", manifest.model}, {"rank", manifest.rank}, {"vocab", manifest.vocab},
                {"parameters", manifest.parameters()}, {"files", names}};
  std::printf("%s\n", found.dump().c_str());
}

void history(const Strings& words) {
  History kept(words.at(1));
  for (int i = std::stoi(words.at(2)); i > 0; --i)
    kept.add({unix_now(), std::string(32, 'a'), static_cast<uint32_t>(i), 1, 1, 1, true});
  std::printf("%zu\n", kept.read(unix_now()).size());
}

void senses(const std::string& folder) {
  Readings now = linux_platform(folder)->read();
  json found = {{"charging", now.charging}, {"battery_percent", now.battery_percent},
                {"thermal", now.thermal},   {"metered", now.metered},
                {"idle", now.idle},         {"storage_bytes", now.storage_bytes},
                {"memory_bytes", now.memory_bytes}};
  std::printf("%s\n", found.dump().c_str());
}

void run(const Strings& words) {
  std::string first = words.empty() ? "" : words[0];
  if (first == "policies") return policies(words.at(1));
  if (first == "bundle") return bundle(words);
  if (first == "history") return history(words);
  if (first == "senses") return senses(words.at(1));
  Options options = read_options(words);
  serve(options, lines_in(options.data), {"fedavg"}, "executorch 1.5.1",
        [&](const Bundle&) { return std::make_unique<Stub>(options.state); });
}

}  // namespace
}  // namespace corolla

int main(int count, char** words) {
  return corolla::guarded([&] { corolla::run({words + 1, words + count}); });
}
