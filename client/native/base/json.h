// JSON of others: bounded in depth and number of values before anything is built of it.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

namespace corolla {

constexpr size_t kMostValues = 1 << 18;

// Throws Error, which starts with `what`, for what is no JSON, is nested more than 32 times, or has
// more than `most` values.
nlohmann::json parse_json(std::string_view text, const char* what, size_t most = kMostValues);

}  // namespace corolla
