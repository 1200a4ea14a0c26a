#include "base/tensors.h"

#include "base/hash.h"

namespace corolla {
namespace {

const char* torch_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64: return "torch.float64";
    case Dtype::f32: return "torch.float32";
    case Dtype::f16: return "torch.float16";
    case Dtype::bf16: return "torch.bfloat16";
    case Dtype::i64: return "torch.int64";
    case Dtype::i32: return "torch.int32";
    case Dtype::u8: return "torch.uint8";
  }
  throw Error("a tensor has an unknown type");
}

std::string tuple(const std::vector<int64_t>& shape) {  // as Python writes one
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

}  // namespace

size_t width(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
    case Dtype::i64: return 8;
    case Dtype::f32:
    case Dtype::i32: return 4;
    case Dtype::f16:
    case Dtype::bf16: return 2;
    case Dtype::u8: return 1;
  }
  throw Error("a tensor has an unknown type");
}

const Tensor& find(const Params& params, const std::string& name, const char* where) {
  const auto found = params.find(name);
  if (found == params.end()) throw Error(std::string(where) + " lacks tensor " + name);
  return found->second;
}

std::string digest(const Params& params) {
  Sha256 sha;
  for (const auto& [name, tensor] : params) {
    sha.update(name + "|" + torch_name(tensor.dtype) + "|" + tuple(tensor.shape) + "|");
    sha.update(tensor.bytes);
  }
  return sha.hex();
}

std::string digest(const Payload& payload) {
  std::string text;
  for (const auto& [group, params] : payload)
    text += (text.empty() ? "" : "|") + group + ":" + digest(params);
  return sha256(text);
}

std::string content_id(const Params& params) { return digest(params).substr(0, 32); }

std::string origin(const std::string& base, const Payload& first) {
  return hex(blake2b(base + "|" + digest(first), 16));
}

std::string after(const std::string& version, const Params& row) {
  return hex(blake2b(version + "|" + digest(row), 16));
}

}  // namespace corolla
