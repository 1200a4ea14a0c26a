#include "training/scalars.h"

#include <algorithm>
#include <cmath>

#include "base/half.h"

namespace corolla {
namespace {

constexpr uint32_t kMostScalars = 65536;

std::vector<uint32_t> from_bitmap(const std::string& data, uint32_t size,
                                  const std::string& where) {
  if (data.size() != (size + 7) / 8) throw Error(where + " has a bitmap of a wrong length");
  std::vector<uint32_t> indices;
  for (uint32_t i = 0; i < 8 * data.size(); i++)
    if (static_cast<uint8_t>(data[i / 8]) >> (i % 8) & 1) indices.push_back(i);
  if (!indices.empty() && indices.back() >= size)
    throw Error(where + " has a direction beyond its size");
  return indices;
}

std::vector<uint32_t> from_gaps(const std::string& data, uint32_t size, const std::string& where) {
  if (data.size() > 5 * static_cast<size_t>(size)) throw Error(where + " has too many varints");
  std::vector<uint32_t> indices;
  uint64_t gap = 0, index = 0;
  int shift = 0;
  for (const char c : data) {
    const auto part = static_cast<uint8_t>(c);
    if (shift > 28) throw Error(where + " has a varint of more than 5 bytes");
    gap |= static_cast<uint64_t>(part & 127) << shift;
    shift += 7;
    if (part > 127) continue;
    if (!indices.empty() && !gap) throw Error(where + " has a direction twice");
    index += gap;
    if (index >= size) throw Error(where + " has a direction beyond its size");
    indices.push_back(static_cast<uint32_t>(index));
    gap = 0, shift = 0;
  }
  if (shift) throw Error(where + " has a truncated varint");
  return indices;
}

std::string to_gaps(const std::vector<uint32_t>& indices) {
  std::string data;
  uint32_t before = 0;
  for (const uint32_t index : indices) {
    uint32_t gap = index - before;
    for (; gap > 127; gap >>= 7) data += static_cast<char>(gap | 128);
    data += static_cast<char>(gap);
    before = index;
  }
  return data;
}

// Leaves out zeros where that is fewer bytes; returns the values to send.
std::string shortest(v1::Scalars& entry, const std::string& values, size_t bytes) {
  std::vector<uint32_t> kept;
  const size_t size = values.size() / bytes;
  const std::string zero(bytes, '\0');
  for (size_t i = 0; i < size; i++)
    if (values.compare(i * bytes, bytes, zero)) kept.push_back(static_cast<uint32_t>(i));
  const size_t dropped = (size - kept.size()) * bytes, bitmap = (size + 7) / 8;
  if (!dropped) return values;
  const std::string gaps = to_gaps(kept);
  if (dropped <= std::min(gaps.size(), bitmap)) return values;
  if (bitmap <= gaps.size()) {
    std::string bits(bitmap, '\0');
    for (const uint32_t i : kept)
      bits[i / 8] = static_cast<char>(static_cast<uint8_t>(bits[i / 8]) | 1u << (i % 8));
    entry.set_bitmap(bits);
  } else {
    entry.set_varint(gaps);
  }
  std::string sent;
  for (const uint32_t i : kept) sent.append(values, i * bytes, bytes);
  return sent;
}

Tensor directions(const v1::Scalars& entry, const std::string& where) {
  const uint32_t size = entry.size();
  if (entry.fixed32().size() != 4 * static_cast<size_t>(size))
    throw Error(where + " has a wrong number of directions");
  std::vector<int32_t> numbers(size);
  std::memcpy(numbers.data(), entry.fixed32().data(), entry.fixed32().size());
  for (const int32_t k : numbers)
    if (static_cast<uint32_t>(k) >= kMostScalars) throw Error(where + " has too large a direction");
  return vector_of(numbers);
}

}  // namespace

Params load_scalars(const v1::Scalars& entry, const std::string& where) {
  const uint32_t size = entry.size();
  if (size > kMostScalars) throw Error(where + " has size " + std::to_string(size));
  const bool half = entry.values_case() == v1::Scalars::kFp16;
  if (!half && entry.values_case() != v1::Scalars::kFp32) throw Error(where + " has no values");
  const std::string& data = half ? entry.fp16() : entry.fp32();
  const size_t bytes = half ? 2 : 4;
  const bool bitmap = entry.directions_case() == v1::Scalars::kBitmap;
  const bool sparse = bitmap || entry.directions_case() == v1::Scalars::kVarint;
  std::vector<uint32_t> indices;
  if (sparse)
    indices = bitmap ? from_bitmap(entry.bitmap(), size, where)
                     : from_gaps(entry.varint(), size, where);
  if (data.size() != (sparse ? indices.size() : size) * bytes)
    throw Error(where + " has a wrong number of values");
  Tensor values{half ? Dtype::f16 : Dtype::f32, {size}, data};
  if (sparse) {
    values.bytes.assign(size * bytes, '\0');
    for (size_t i = 0; i < indices.size(); i++)
      values.bytes.replace(indices[i] * bytes, bytes, data, i * bytes, bytes);
  }
  Params params{{"scalars", std::move(values)}};
  if (entry.directions_case() == v1::Scalars::kFixed32)
    params["directions"] = directions(entry, where);
  if (entry.has_seed()) params["seed"] = tensor_of<int64_t>({entry.seed()}, {});
  if (entry.has_step()) {
    if (!std::isfinite(entry.step())) throw Error(where + " has a step that is not finite");
    params["step"] = tensor_of<float>({entry.step()}, {});
  }
  return params;
}

v1::Scalars dump_scalars(const Params& params, const std::string& group) {
  const Tensor& values = find(params, "scalars", "a scalar group");
  if (values.size() > kMostScalars) throw Error("a scalar group has too many scalars");
  v1::Scalars entry;
  entry.set_group(group);
  entry.set_size(static_cast<uint32_t>(values.size()));
  std::string sent = values.bytes;
  if (const auto found = params.find("directions"); found != params.end())
    entry.set_fixed32(found->second.bytes);
  else
    sent = shortest(entry, values.bytes, width(values.dtype));
  if (values.dtype == Dtype::f16)
    entry.set_fp16(sent);
  else
    entry.set_fp32(sent);
  if (const auto found = params.find("seed"); found != params.end())
    entry.set_seed(static_cast<uint32_t>(values_of<int64_t>(found->second).at(0)));
  if (const auto found = params.find("step"); found != params.end())
    entry.set_step(values_of<float>(found->second).at(0));
  return entry;
}

std::vector<double> scalars_of(const Params& params) {
  const Tensor& tensor = find(params, "scalars", "a scalar group");
  std::vector<double> values;
  if (tensor.dtype == Dtype::f32) {
    for (const float value : values_of<float>(tensor)) values.push_back(value);
    return values;
  }
  for (size_t i = 0; i < tensor.size(); i++) {
    uint16_t half;
    std::memcpy(&half, tensor.bytes.data() + 2 * i, 2);
    values.push_back(from_fp16(half));
  }
  return values;
}

Tensor scalars_tensor(const std::vector<float>& values, bool half) {
  if (!half) return vector_of(values);
  Tensor made{Dtype::f16, {static_cast<int64_t>(values.size())}, ""};
  for (const float value : values) {
    const uint16_t bits = to_fp16(value);
    made.bytes.append(reinterpret_cast<const char*>(&bits), 2);
  }
  return made;
}

}  // namespace corolla
