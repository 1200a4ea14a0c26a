#include "training/settings.h"

#include <cmath>

#include "base/error.h"
#include "base/json.h"
#include "base/signs.h"

namespace corolla {
namespace {

using nlohmann::json;

constexpr int64_t kMany = 1 << 20;  // steps, rounds, queries: no run has more

double number(const json& table, const char* key, double least, double most) {
  const auto found = table.find(key);
  const bool given = found != table.end() && found->is_number();
  const double value = given ? found->get<double>() : 0.0;
  if (!given || !(value >= least && value <= most))
    throw Error(std::string("the task has no usable ") + key);
  return value;
}

int64_t whole(const json& table, const char* key, int64_t least, int64_t most) {
  const auto found = table.find(key);
  if (found == table.end() || !found->is_number_integer())
    throw Error(std::string("the task has no usable ") + key);
  return static_cast<int64_t>(
      number(table, key, static_cast<double>(least), static_cast<double>(most)));
}

std::string text(const json& table, const char* key) {
  const auto found = table.find(key);
  if (found == table.end() || found->is_null()) return "";
  if (!found->is_string()) throw Error(std::string("the task has no usable ") + key);
  return found->get<std::string>();
}

bool given(const json& table, const char* key) {
  const auto found = table.find(key);
  return found != table.end() && !found->is_null();
}

// What differs for the clients of a class, put over the settings of the run.
json of_class(const json& run, const std::string& kind) {
  if (kind.empty()) return run;
  const auto classes = run.find("classes");
  if (classes == run.end() || !classes->is_object() || !classes->contains(kind))
    throw Error("the run has no class " + kind);
  json own = run;
  const json& changes = (*classes)[kind];
  for (const char* key : {"trainer", "lr", "local_steps", "batch_size", "queries", "eps"})
    if (given(changes, key)) own[key] = changes[key];
  return own;
}

void refuse_unknown(const json& run) {
  const auto refuse = [](const std::string& what) {
    throw Error(what + " is not for native clients: leave it out, or train with corolla client");
  };
  if (text(run, "parameters") != "lora") refuse("parameters=" + text(run, "parameters"));
  if (text(run, "dp") == "example") refuse("dp=example");
  for (const char* key : {"codec", "codec_down"})
    if (run.contains(key) && !run[key].empty()) refuse(key);
}

Lora lora(const json& table) {
  if (!table.is_object()) throw Error("the task has no rank");
  Lora made;
  made.rank = static_cast<int>(whole(table, "rank", 1, 65536));
  made.alpha = number(table, "alpha", 1e-30, 1e30);
  made.rslora = table.value("rslora", false);
  return made;
}

Run settings_of(const json& table) {
  Run run;
  const auto seed = table.find("seed");
  if (seed == table.end() || !seed->is_number_unsigned())
    throw Error("the task has no usable seed");
  run.seed = seed->get<uint64_t>();
  run.strategy = text(table, "strategy");
  run.trainer = text(table, "trainer");
  const json options = table.value("options", json::object());
  if (given(options, "size")) {
    run.pool = static_cast<uint32_t>(whole(options, "size", 1, kMaxPool));
    if (!is_pool(run.pool)) throw Error("the task has a size that is no power of two");
  }
  run.scalars = text(options, "scalars");
  run.rounds = whole(table, "rounds", 1, kMany);
  run.optimizer = text(table, "optimizer");
  run.schedule = text(table, "schedule");
  run.estimator = text(table, "estimator");
  run.lr = number(table, "lr", 0, 1e30);
  run.eps = number(table, "eps", 1e-20, 1e30);
  run.weight_decay = number(table, "weight_decay", 0, 1e30);
  run.warmup_rounds = number(table, "warmup_rounds", 0, 1e12);
  if (given(table, "clip_norm")) run.clip_norm = number(table, "clip_norm", 0, 1e30);
  run.local_steps = whole(table, "local_steps", 1, kMany);
  if (given(table, "local_epochs")) run.local_epochs = whole(table, "local_epochs", 1, kMany);
  run.batch_size = whole(table, "batch_size", 1, kMany);
  run.queries = whole(table, "queries", 1, kMany);
  run.dropout = number(table, "dropout", 0, 1);
  run.max_length = whole(table, "max_length", 1, kMany);
  return run;
}

}  // namespace

double Lora::scaling() const { return alpha / (rslora ? std::sqrt(rank) : rank); }

Settings read_settings(const std::string& config, const std::string& kind) {
  const json told = parse_json(config, "the settings of the task");
  try {
    Settings settings;
    settings.lora = lora(told.at("lora"));
    settings.kind = kind.empty() ? text(told, "class") : kind;
    json run = of_class(told.at("run"), settings.kind);
    refuse_unknown(run);
    settings.run = settings_of(run);
    // A class without a rate of its own gets one from the server; this one cannot make it up.
    if (!settings.run.trainer.empty() && !settings.kind.empty() &&
        !given(told["run"]["classes"][settings.kind], "lr"))
      throw Error("the task does not tell the lr of class " + settings.kind);
    return settings;
  } catch (const json::exception&) {
    throw Error("the settings of the task lack something");
  }
}

}  // namespace corolla
