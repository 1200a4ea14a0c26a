// JSON of others: bounded in depth before anything is built of it.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

namespace corolla {

// Throws Error, which starts with `what`, for what is no JSON or is nested more than 32 times.
nlohmann::json parse_json(std::string_view text, const char* what);

}  // namespace corolla
