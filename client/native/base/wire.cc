#include "base/wire.h"

#include <algorithm>
#include <optional>
#include <string>

#include "base/error.h"

namespace corolla {
namespace {

constexpr uint32_t kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;

// Cuts a number off the front; nothing where there is none.
std::optional<uint64_t> varint(std::string_view& data) {
  uint64_t value = 0;
  for (int shift = 0; shift < 70 && !data.empty(); shift += 7) {
    const auto byte = static_cast<uint8_t>(data.front());
    data.remove_prefix(1);
    if (shift < 64) value |= static_cast<uint64_t>(byte & 127) << shift;
    if (byte < 128) return value;
  }
  return {};
}

struct Field {
  uint32_t number;
  std::string_view content;  // of bytes, texts and messages
};

// Cuts a field off the front; nothing where there is none.
std::optional<Field> field(std::string_view& data) {
  const auto tag = varint(data);
  if (!tag) return {};
  uint64_t size = 0;
  const auto wide = static_cast<uint32_t>(*tag);  // as the parser does: further bits are dropped
  Field found{wide >> 3, {}};
  switch (wide & 7) {
    case kVarint: return varint(data) ? std::optional(found) : std::nullopt;
    case kFixed64: size = 8; break;
    case kFixed32: size = 4; break;
    case kBytes: {
      const auto told = varint(data);
      if (!told) return {};
      size = *told;
      break;
    }
    default: throw Error("message cannot be parsed");  // groups, of before 2008
  }
  if (size > data.size()) return {};
  if ((wide & 7) == kBytes) found.content = data.substr(0, size);
  data.remove_prefix(size);
  return found;
}

// A message may be there in parts, which are merged: the counts go on.
void count(std::string_view message, const std::vector<Repeated>& fields,
           std::vector<uint32_t>& path, std::vector<size_t>& counts) {
  while (const auto found = field(message)) {
    path.push_back(found->number);
    bool leads = false;
    for (size_t i = 0; i < fields.size(); i++) {
      const auto& wanted = fields[i].path;
      if (wanted.size() < path.size() || !std::equal(path.begin(), path.end(), wanted.begin()))
        continue;
      if (wanted.size() > path.size())
        leads = true;
      else if (++counts[i] > fields[i].most)
        throw Error("message has more than " + std::to_string(fields[i].most) + " " +
                    fields[i].name);
    }
    if (leads) count(found->content, fields, path, counts);
    path.pop_back();
  }
}

}  // namespace

void check_counts(std::string_view message, const std::vector<Repeated>& fields) {
  std::vector<size_t> counts(fields.size(), 0);
  std::vector<uint32_t> path;
  count(message, fields, path, counts);
}

}  // namespace corolla
