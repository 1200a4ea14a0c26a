#include "base/safetensors.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <vector>

#include "base/files.h"
#include "base/json.h"

namespace corolla {
namespace {

using nlohmann::json;

constexpr size_t kLargestHeader = 8 << 20;
constexpr size_t kMostTensors = 65536;

struct Named {
  const char* name;
  Dtype dtype;
};
// The widest first: in this order tensors are written, so that each one is aligned.
constexpr Named kTypes[] = {{"F64", Dtype::f64},   {"I64", Dtype::i64}, {"F32", Dtype::f32},
                            {"I32", Dtype::i32},   {"F16", Dtype::f16}, {"BF16", Dtype::bf16},
                            {"U8", Dtype::u8}};

[[noreturn]] void refuse(const std::string& why) {
  throw Error("tensors cannot be read: " + one_line(why));
}

Dtype dtype_named(const std::string& name) {
  for (const Named& known : kTypes)
    if (name == known.name) return known.dtype;
  refuse("unknown type " + name.substr(0, 20));
}

uint64_t whole(const json& value) {
  if (!value.is_number_unsigned()) refuse("a size is no number");
  return value.get<uint64_t>();
}

// Bytes of a tensor by its shape.
uint64_t expected(Dtype dtype, const std::vector<int64_t>& shape) {
  uint64_t bytes = width(dtype);
  for (const int64_t extent : shape)
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(extent), &bytes))
      refuse("a shape is too large");
  return bytes;
}

struct Span {
  std::string name;
  Dtype dtype;
  std::vector<int64_t> shape;
  uint64_t begin, end;
};

Span span(const std::string& name, const json& entry) {
  Span found{name, dtype_named(entry.at("dtype").get<std::string>()), {}, 0, 0};
  const json& shape = entry.at("shape");
  const json& edges = entry.at("data_offsets");
  if (!shape.is_array() || shape.size() > 8 || !edges.is_array() || edges.size() != 2)
    refuse("a shape or its offsets are no list");
  for (const json& extent : shape) {
    if (whole(extent) > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      refuse("a shape is too large");
    found.shape.push_back(static_cast<int64_t>(whole(extent)));
  }
  found.begin = whole(edges[0]), found.end = whole(edges[1]);
  return found;
}

Stored read(std::string_view bytes) {
  if (bytes.size() < 8) refuse("only " + std::to_string(bytes.size()) + " bytes");
  uint64_t length = 0;
  for (int i = 7; i >= 0; i--) length = length << 8 | static_cast<uint8_t>(bytes[i]);
  if (length > kLargestHeader || length > bytes.size() - 8)
    refuse("a header of " + std::to_string(length) + " bytes");
  const json header = parse_json(bytes.substr(8, length), "the header of tensors");
  if (!header.is_object() || header.size() > kMostTensors) refuse("the header is no table");
  const std::string_view content = bytes.substr(8 + length);
  Stored file;
  std::vector<Span> spans;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__")
      file.facts = entry.get<Facts>();
    else
      spans.push_back(span(name, entry));
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  uint64_t at = 0;
  for (const Span& own : spans) {  // one after the other, without a gap: then no size can lie
    if (own.begin != at || own.end < own.begin || own.end > content.size())
      refuse("the offsets of " + own.name.substr(0, 80) + " do not fit");
    if (own.end - own.begin != expected(own.dtype, own.shape))
      refuse("the shape of " + own.name.substr(0, 80) + " does not fit its bytes");
    at = own.end;
  }
  if (at != content.size()) refuse("bytes that belong to no tensor");
  for (Span& own : spans)
    file.tensors[own.name] = {own.dtype, std::move(own.shape),
                              std::string(content.substr(own.begin, own.end - own.begin))};
  return file;
}

}  // namespace

Stored decode(std::string_view bytes) {
  try {
    return read(bytes);
  } catch (const json::exception&) {
    refuse("the header lacks something");
  }
}

std::string encode(const Params& tensors, const Facts& facts) {
  json header = json::object();
  if (!facts.empty()) header["__metadata__"] = facts;
  std::vector<const Tensor*> order;
  uint64_t at = 0;
  for (const Named& type : kTypes)
    for (const auto& [name, tensor] : tensors) {
      if (tensor.dtype != type.dtype) continue;
      const uint64_t end = at + tensor.bytes.size();
      header[name] = {{"dtype", type.name}, {"shape", tensor.shape}, {"data_offsets", {at, end}}};
      order.push_back(&tensor);
      at = end;
    }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string bytes;
  bytes.reserve(8 + text.size() + at);
  for (int i = 0; i < 64; i += 8) bytes += static_cast<char>(text.size() >> i);
  bytes += text;
  for (const Tensor* tensor : order) bytes += tensor->bytes;
  return bytes;
}

Payload decode_payload(std::string_view bytes) {
  Stored file = decode(bytes);
  const auto listed = file.facts.find("groups");
  if (listed == file.facts.end()) refuse("there is no list of groups");
  const json groups = parse_json(listed->second, "the list of groups");
  Payload payload;
  if (!groups.is_array()) refuse("the groups are no list");
  for (const json& group : groups) {
    if (!group.is_string()) refuse("a group has no name");
    payload[group.get<std::string>()];
  }
  for (auto& [key, tensor] : file.tensors) {
    const size_t cut = key.find('/');
    const auto group = payload.find(key.substr(0, cut));
    if (cut == std::string::npos || group == payload.end())
      refuse("tensor " + key.substr(0, 80) + " is of no group");
    group->second[key.substr(cut + 1)] = std::move(tensor);
  }
  return payload;
}

std::string encode_payload(const Payload& payload) {
  Params flat;
  json groups = json::array();
  for (const auto& [group, params] : payload) {
    groups.push_back(group);
    for (const auto& [name, tensor] : params) flat[group + "/" + name] = tensor;
  }
  return encode(flat, {{"groups", groups.dump()}});
}

Stored load_tensors(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::error_code failed;
  const uintmax_t size = std::filesystem::file_size(path, failed);
  if (!stream || failed) throw Error("cannot read " + path.string());
  std::string bytes(size, '\0');
  stream.read(bytes.data(), static_cast<std::streamsize>(size));
  try {
    if (static_cast<uintmax_t>(stream.gcount()) != size) throw Error("it ends early");
    return decode(bytes);
  } catch (const Error& error) {
    throw Error(path.string() + ": " + error.what());
  }
}

}  // namespace corolla
