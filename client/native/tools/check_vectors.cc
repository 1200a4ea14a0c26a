#include <cstring>

#include "base/error.h"
#include "base/half.h"
#include "base/json.h"
#include "base/signs.h"
#include "tools/testbench.h"

namespace corolla {
namespace {

using nlohmann::json;

uint64_t word(const json& text) { return std::stoull(text.get<std::string>(), nullptr, 16); }
Key key_of(const json& pair) { return {word(pair[0]), word(pair[1])}; }
float number(const json& text) { return float_of_bits(static_cast<uint32_t>(word(text))); }

double wide(const json& text) {
  const uint64_t bits = word(text);
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Values of any of the three types, as the bytes that they have in memory.
std::string packed(const json& list, Type type) {
  std::string bytes;
  for (const json& text : list) {
    const auto bits = static_cast<uint32_t>(word(text));
    bytes.append(reinterpret_cast<const char*>(&bits), type == Type::fp32 ? 4 : 2);
  }
  return bytes;
}

Type type_of(const json& entry) {
  const auto name = entry.at("type").get<std::string>();
  return name == "fp32" ? Type::fp32 : name == "bf16" ? Type::bf16 : Type::fp16;
}

bool philox_holds(const json& entry) {
  uint64_t counter[4];
  for (int i = 0; i < 4; i++) counter[i] = word(entry["counter"][i]);
  const auto made = philox(counter, key_of(entry["key"]));
  for (int i = 0; i < 4; i++)
    if (made[i] != word(entry["words"][i])) return false;
  return true;
}

bool signs_hold(const json& entry) {
  const auto known = entry["signs"].get<std::string>();
  return signs(key_of(entry["key"]), entry["k"].get<uint32_t>(), entry["start"].get<uint64_t>(),
               known.size()) == known;
}

bool choices_hold(const json& entry) {
  const auto known = entry["choices"].get<std::vector<uint32_t>>();
  return choices(word(entry["seed"]), known.size(), entry["size"].get<uint32_t>()) == known;
}

bool fwht_holds(const json& entry) {
  std::vector<double> values;
  for (const json& text : entry["a"]) values.push_back(number(text));
  fwht(values);
  for (size_t i = 0; i < values.size(); i++)
    if (values[i] != wide(entry["v"][i])) return false;
  return true;
}

bool add_holds(const json& entry) {
  const Type type = type_of(entry);
  std::string values = packed(entry["source"], type);
  std::vector<Term> terms;
  for (const json& term : entry["terms"])
    terms.push_back({term[0].get<uint32_t>(), number(term[1])});
  add(values.data(), values.data(), type, entry["offset"].get<uint64_t>(), entry["source"].size(),
      key_of(entry["key"]), terms);
  return values == packed(entry["out"], type);
}

bool replay_holds(const json& entry) {
  const Type type = type_of(entry);
  std::string values = packed(entry["source"], type);
  std::vector<Round> rounds;
  for (const json& log : entry["logs"]) {
    std::vector<double> sums;
    for (const json& text : log["a"]) sums.push_back(number(text));
    rounds.push_back(prepared(key_of(log["key"]), sums, wide(log["scale"])));
    for (size_t i = 0; i < rounds.back().values.size(); i++)
      if (bits_of_float(rounds.back().values[i]) != word(log["v"][i])) return false;
  }
  replay(values.data(), values.data(), type, entry["offset"].get<uint64_t>(),
         entry["source"].size(), rounds);
  return values == packed(entry["out"], type);
}

}  // namespace

void check_vectors(const std::string& text) {
  const json vectors = parse_json(text, "the file of vectors");
  const std::pair<const char*, bool (*)(const json&)> checks[] = {
      {"philox", philox_holds}, {"signs", signs_hold}, {"choices", choices_hold},
      {"fwht", fwht_holds},     {"add", add_holds},    {"replay", replay_holds}};
  for (const auto& [name, holds] : checks)
    for (size_t i = 0; i < vectors.at(name).size(); i++)
      if (!holds(vectors[name][i]))
        throw Error(std::string(name) + " vector " + std::to_string(i) + " differs");
}

}  // namespace corolla
