#include "base/json.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace corolla {
namespace {

// At least as many as there are values: each but the first follows one of these.
size_t values_in(std::string_view text) {
  return static_cast<size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return c == ',' || c == '[' || c == '{'; }));
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const char* what, size_t most) {
  const auto bounded = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    if (depth > 32) throw Error(std::string(what) + " is nested too deeply");
    return true;
  };
  if (values_in(text) > most) throw Error(std::string(what) + " has too many values");
  try {
    return nlohmann::json::parse(text.begin(), text.end(), bounded);
  } catch (const nlohmann::json::exception&) {
    throw Error(std::string(what) + " is no JSON");
  }
}

}  // namespace corolla
