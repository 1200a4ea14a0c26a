#include "training/settings.h"

#include <cmath>
#include <cstdio>
#include <map>

#include "base/error.h"
#include "base/json.h"
#include "base/signs.h"

namespace corolla {
namespace {

using nlohmann::json;

struct Limits {
  double least, most;  // both are allowed
};

// As corolla/wire/ranges.py has them; tests/received_numbers.json tries both.
const std::map<std::string, Limits> kNumbers = {
    {"lr", {1e-30, 1e6}},        {"eps", {1e-20, 1e3}},         {"alpha", {1e-6, 1e6}},
    {"weight_decay", {0, 1e6}},  {"warmup_rounds", {0, 1e5}},   {"clip_norm", {1e-10, 1e10}},
    {"dropout", {0, 1}},
};
const std::map<std::string, Limits> kCounts = {
    {"rank", {1, 65536}},         {"rounds", {1, 100000}},      {"local_steps", {1, 100000}},
    {"local_epochs", {1, 100000}}, {"batch_size", {1, 65536}},  {"queries", {1, 65536}},
    {"max_length", {8, 1048576}},  {"size", {1, kMaxPool}},
};

std::string written(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

[[noreturn]] void unusable(const json& table, const char* key, const std::string& kind,
                           const Limits& limits) {
  const auto found = table.find(key);
  throw Error(std::string("the task has no usable ") + key + ": expected a " + kind + " from " +
              written(limits.least) + " to " + written(limits.most) + ", found " +
              (found == table.end() ? "nothing" : found->dump().substr(0, 40)));
}

double number(const json& table, const char* key) {
  const Limits& limits = kNumbers.at(key);
  const auto found = table.find(key);
  const bool given = found != table.end() && found->is_number();
  const double value = given ? found->get<double>() : 0.0;
  if (!given || !(value >= limits.least && value <= limits.most))
    unusable(table, key, "number", limits);
  return value;
}

int64_t whole(const json& table, const char* key) {
  const Limits& limits = kCounts.at(key);
  const auto found = table.find(key);
  const bool given = found != table.end() && found->is_number_integer();
  const double value = given ? found->get<double>() : 0.0;
  if (!given || !(value >= limits.least && value <= limits.most))
    unusable(table, key, "whole number", limits);
  return static_cast<int64_t>(value);
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
  made.rank = static_cast<int>(whole(table, "rank"));
  made.alpha = number(table, "alpha");
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
    run.pool = static_cast<uint32_t>(whole(options, "size"));
    if (!is_pool(run.pool)) throw Error("the task has a size that is no power of two");
  }
  run.scalars = text(options, "scalars");
  run.rounds = whole(table, "rounds");
  run.optimizer = text(table, "optimizer");
  run.schedule = text(table, "schedule");
  run.estimator = text(table, "estimator");
  run.lr = number(table, "lr");
  run.eps = number(table, "eps");
  run.weight_decay = number(table, "weight_decay");
  run.warmup_rounds = number(table, "warmup_rounds");
  if (given(table, "clip_norm")) run.clip_norm = number(table, "clip_norm");
  run.local_steps = whole(table, "local_steps");
  if (given(table, "local_epochs")) run.local_epochs = whole(table, "local_epochs");
  run.batch_size = whole(table, "batch_size");
  run.queries = whole(table, "queries");
  run.dropout = number(table, "dropout");
  run.max_length = whole(table, "max_length");
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
