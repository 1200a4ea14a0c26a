// Named tensors, as they travel and are stored.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "base/error.h"

namespace corolla {

enum class Dtype { f64, f32, f16, bf16, i64, i32, u8 };

size_t width(Dtype dtype);  // bytes of a value

struct Tensor {
  Dtype dtype = Dtype::f32;
  std::vector<int64_t> shape;
  std::string bytes;  // row-major, little-endian

  size_t size() const { return bytes.size() / width(dtype); }
};

using Params = std::map<std::string, Tensor>;    // tensor name -> tensor
using Payload = std::map<std::string, Params>;   // group -> its tensors
using Facts = std::map<std::string, std::string>;  // the metadata of a file

template <typename T>
constexpr Dtype dtype_of();
template <>
constexpr Dtype dtype_of<double>() { return Dtype::f64; }
template <>
constexpr Dtype dtype_of<float>() { return Dtype::f32; }
template <>
constexpr Dtype dtype_of<int64_t>() { return Dtype::i64; }
template <>
constexpr Dtype dtype_of<int32_t>() { return Dtype::i32; }

template <typename T>
Tensor tensor_of(const std::vector<T>& values, std::vector<int64_t> shape) {
  return {dtype_of<T>(), std::move(shape),
          std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T))};
}

template <typename T>
Tensor vector_of(const std::vector<T>& values) {
  return tensor_of(values, {static_cast<int64_t>(values.size())});
}

// The values of a tensor. Throws Error for another type.
template <typename T>
std::vector<T> values_of(const Tensor& tensor) {
  if (tensor.dtype != dtype_of<T>()) throw Error("a tensor has another type than expected");
  std::vector<T> values(tensor.size());
  if (!values.empty()) std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  return values;
}

// The tensor of a name. Throws Error, which says where it is lacking.
const Tensor& find(const Params& params, const std::string& name, const char* where);

// sha256 over names, types, shapes and bytes, in the order of names: as corolla/tensors/tree.py.
std::string digest(const Params& params);
// The same over the groups of a payload, in the order of their names.
std::string digest(const Payload& payload);
// The name of a cached group by its content.
std::string content_id(const Params& params);

// The version before any row of a log, of a base model and the first state; 32 hexadecimal
// characters.
std::string origin(const std::string& base, const Payload& first);
// The version that a row leads to.
std::string after(const std::string& version, const Params& row);

}  // namespace corolla
