// Messages of protobuf as bytes: what is in them is counted before anything is built of it. An
// empty entry of a repeated field takes 2 bytes here, and 50 to 100 once it is parsed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace corolla {

// A repeated field, by the numbers of the fields that lead to it, and how often it may be there.
struct Repeated {
  std::vector<uint32_t> path;
  size_t most;
  const char* name;  // in words: "cached groups"
};

// Throws Error for a message with more entries than it may have, or with groups, of which no
// message here has any. Where it breaks off the parser does as well.
void check_counts(std::string_view message, const std::vector<Repeated>& fields);

}  // namespace corolla
