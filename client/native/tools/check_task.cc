#include <iostream>

#include "base/hash.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "tools/measure.h"
#include "tools/testbench.h"
#include "training/engine.h"
#include "training/layout.h"
#include "training/scalars.h"
#include "training/task.h"

namespace corolla {
namespace {

using nlohmann::json;

// Conditions that lapse after so many passes.
class Counted : public Conditions {
 public:
  explicit Counted(int64_t passes) : left_(passes) {}
  std::string lapsed() override { return left_-- > 0 ? "" : "not charging any more"; }

 private:
  int64_t left_;
};

Manifest manifest_of(const std::string& bundle) {
  return parse_manifest(slurp(bundle + "/manifest.json"));
}

void scalars(const Arguments& given) {
  v1::Scalars entry;
  if (!entry.ParseFromString(slurp(given.at(1)))) throw Error("no Scalars");
  const Params params = load_scalars(entry, "group");
  json told = json::object();
  for (const auto& [name, tensor] : params) told[name] = hex(tensor.bytes);
  std::cout << json{{"tensors", told},
                    {"digest", digest(params)},
                    {"packed", hex(dump_scalars(params, entry.group()).SerializeAsString())}}
            << "\n";
}

void tokens(const Arguments& given) {
  const Data data = read_tokens(given.at(1), given.size() > 2 ? std::stoll(given[2]) : 0);
  int64_t targets = 0;
  for (const Sequence& own : data.sequences) targets += own.targets();
  std::cout << json{{"sequences", data.sequences.size()},
                    {"targets", targets},
                    {"examples", data.examples()}}
            << "\n";
}

void losses(const Arguments& given) {
  const Manifest manifest = manifest_of(given.at(1));
  const Layout layout(manifest.adapter);
  const auto weights = layout.flatten(load_tensors(given.at(5)).tensors);
  const Data data = read_tokens(given.at(4), manifest.vocab);
  const size_t length = given.size() > 6 ? std::stoul(given[6]) : manifest.length;
  Engine engine(manifest, given.at(1), given.at(2), given.at(3), 1);
  for (const Sequence& own : data.sequences) {
    const View view{&own, std::min(own.ids.size(), length), own.targets()};
    std::vector<float> gradient(weights.size());
    const double loss = given[3] == "grad" ? engine.gradient(view, weights, gradient)
                                           : engine.loss(view, weights);
    double squares = 0;
    for (const float g : gradient) squares += static_cast<double>(g) * g;
    std::cout << json{{"loss", loss}, {"gradient_square", squares}} << "\n";
  }
}

void measured(const Arguments& given) {
  const Measured found =
      measure(manifest_of(given.at(1)), given[1], given.at(2), given.at(3), std::stoi(given.at(4)),
              std::stoi(given.at(5)), given.size() > 6 ? std::stoi(given[6]) : 0, nullptr);
  std::cout << json{{"step_ms_p50", found.step_ms_p50},
                    {"step_ms_min", found.step_ms_min},
                    {"perturb_share", found.perturb_share},
                    {"loss_first", found.loss_first},
                    {"loss_last", found.loss_last},
                    {"peak_rss_bytes", found.peak_rss_bytes}}
            << "\n";
}

void answer(const Arguments& given) {
  const Manifest manifest = manifest_of(given.at(1));
  Trainer trainer(manifest, given[1], read_tokens(given.at(2), manifest.vocab), given.at(3));
  v1::Task task;
  if (!task.ParseFromString(slurp(given.at(5)))) throw Error("no Task");
  const json told = parse_json(given.at(7), "the assignment");
  const Assignment assignment{told.value("kind", ""), told.value("program", ""),
                              told.value("method", ""), told.value("rank", 0),
                              told.value("length", 0)};
  Counted conditions(given.size() > 10 ? std::stoll(given[10]) : INT64_MAX);
  const Answer made =
      trainer.answer(given.at(4), task, slurp(given.at(6)), assignment, conditions);
  spill(given.at(8), made.header.SerializeAsString());
  spill(given.at(9), made.payload);
}

}  // namespace

Commands task_commands() {
  return {{"scalars", {2, scalars}},
          {"tokens", {2, tokens}},
          {"losses", {6, losses}},
          {"measure", {6, measured}},
          {"answer", {10, answer}}};
}

}  // namespace corolla
