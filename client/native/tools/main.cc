// corolla-phone: see kUsage of options.cc.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "tools/measure.h"
#include "tools/selfcheck.h"
#include "tools/serve.h"
#include "training/data.h"
#include "training/strategies.h"
#include "training/task.h"

namespace corolla {
namespace {

using Strings = std::vector<std::string>;

// Trainer, behind what a session knows of it.
class Hired : public Worker {
 public:
  Hired(const Bundle& bundle, const Data& data, const std::filesystem::path& state)
      : trainer_(made(bundle, data, state)) {}

  Strings missing(const std::string& run,
                  const std::map<std::string, std::string>& groups) override {
    return trainer_.missing(run, groups);
  }

  Answer answer(const std::string& client, const v1::Task& task, const std::string& payload,
                const Strings& groups, const Assignment& assignment,
                Conditions& conditions) override {
    v1::Task whole = task;
    std::string all = with_groups(whole, payload, groups);
    return trainer_.answer(client, whole, all, assignment, conditions);
  }

 private:
  static Trainer made(const Bundle& bundle, const Data& data, const std::filesystem::path& state) {
    try {
      return {bundle.manifest, bundle.folder, data, state};
    } catch (const Error& error) {
      throw UsageError(std::string("--data: ") + error.what());
    }
  }

  Trainer trainer_;
};

Data data_of(const std::string& option, const std::filesystem::path& file, int64_t vocabulary = 0) {
  try {
    return read_tokens(file, vocabulary);
  } catch (const Error& error) {
    throw UsageError(option + ": " + error.what());
  }
}

void phone(const Strings& words) {
  Options options = read_options(words);
  Data data = data_of("--data", options.data);
  serve(options, data.examples(), strategies(), "executorch " COROLLA_EXECUTORCH,
        [&](const Bundle& bundle) { return std::make_unique<Hired>(bundle, data, options.state); });
}

std::filesystem::path bundle_of(const Words& words) {
  if (words.rest().size() != 1) throw UsageError("name one folder of a bundle");
  return words.rest()[0];
}

void check(const Strings& all) {
  Words words(all, {"--publisher"}, {});
  auto folder = bundle_of(words);
  Manifest manifest = read_bundle(folder, words.text("--publisher"));
  Strings names;
  for (const auto& [name, facts] : manifest.files) names.push_back(name);
  verify_files(manifest, folder, names);
  std::printf("signature and %zu files: as they should be\n", names.size());
  check_signs();
  std::printf("sign stream: known answers and a replay agree\n");
  constexpr int kTokens = 16;
  for (const auto& program : manifest.programs)
    for (const auto& [method, facts] : program.methods) {
      auto found = measure(manifest, folder, program.name, method,
                           std::min(kTokens, manifest.length), 1, 0, nullptr);
      std::printf("%s %s: loss %.4f, %.0f ms\n", program.name.c_str(), method.c_str(),
                  found.loss_first, found.step_ms_min);
    }
}

void bench(const Strings& all) {
  Words words(all, {"--program", "--method", "--length", "--steps", "--threads", "--tokens"}, {});
  auto folder = bundle_of(words);
  auto text = read_file(folder / "manifest.json", 16 << 20);
  if (!text) throw UsageError(folder.string() + " is no bundle: it has no manifest.json");
  Manifest manifest = parse_manifest(*text);
  Data data;
  if (words.has("--tokens")) data = data_of("--tokens", words.text("--tokens"), manifest.vocab);
  auto number = [&](const char* name, uint64_t usual) {
    return static_cast<int>(words.number(name, usual));
  };
  Measured found = measure(manifest, folder, words.text("--program"), words.text("--method"),
                           number("--length", static_cast<uint64_t>(manifest.length)),
                           number("--steps", 10), number("--threads", 0),
                           words.has("--tokens") ? &data : nullptr);
  nlohmann::json line = {{"step_ms_p50", found.step_ms_p50},
                         {"step_ms_p95", found.step_ms_p95},
                         {"step_ms_min", found.step_ms_min},
                         {"perturb_share", found.perturb_share},
                         {"loss_first", found.loss_first},
                         {"loss_last", found.loss_last},
                         {"peak_rss_bytes", found.peak_rss_bytes}};
  std::printf("%s\n", line.dump().c_str());
}

void run(Strings words) {
  std::string first = words.empty() ? "--help" : words[0];
  if (first == "--help" || first == "-h") {
    std::printf("%s", kUsage);
  } else if (first == "check" || first == "bench") {
    words.erase(words.begin());
    first == "check" ? check(words) : bench(words);
  } else {
    phone(words);
  }
}

}  // namespace
}  // namespace corolla

int main(int count, char** words) {
  return corolla::guarded([&] { corolla::run({words + 1, words + count}); });
}
