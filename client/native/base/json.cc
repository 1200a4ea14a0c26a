#include "base/json.h"

#include <string>

#include "base/error.h"

namespace corolla {

nlohmann::json parse_json(std::string_view text, const char* what) {
  const auto bounded = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    if (depth > 32) throw Error(std::string(what) + " is nested too deeply");
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), bounded);
  } catch (const nlohmann::json::exception&) {
    throw Error(std::string(what) + " is no JSON");
  }
}

}  // namespace corolla
