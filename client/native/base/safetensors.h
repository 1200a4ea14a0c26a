// Tensors as bytes and files in the format of safetensors: checked before anything is allocated.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "base/tensors.h"

namespace corolla {

struct Stored {
  Params tensors;
  Facts facts;
};

// Throws Error for anything but a whole and honest buffer: a truncated one, a header of more than
// 8 MiB, tensors that overlap, leave a gap, or are not what their shape says.
Stored decode(std::string_view bytes);
std::string encode(const Params& tensors, const Facts& facts);

// As corolla/wire/codec.py: tensors are named "<group>/<name>", the metadata "groups" lists the groups.
Payload decode_payload(std::string_view bytes);
std::string encode_payload(const Payload& payload);

// Those of a file. Throws Error, which names it.
Stored load_tensors(const std::filesystem::path& path);

}  // namespace corolla
