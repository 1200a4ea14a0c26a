// Scalar groups: Scalars of proto/update.proto as tensors, and back, as corolla/wire/messages.py.
#pragma once

#include "base/tensors.h"
#include "corolla/proto/update.pb.h"

namespace corolla {

// "scalars" (n,) fp32 or fp16; "directions" (n,) int32, "seed" () int64 and "step" () fp32 where
// the message has them. Throws Error, which starts with `where`, for a message that breaks a limit.
Params load_scalars(const v1::Scalars& entry, const std::string& where);

// The message of a scalar group in the form with the fewest bytes. Throws Error when it is not one.
v1::Scalars dump_scalars(const Params& params, const std::string& group);

// The values in fp64. Throws Error for a group without them.
std::vector<double> scalars_of(const Params& params);
// `half`: fp16, else fp32; each value must be one of that type already.
Tensor scalars_tensor(const std::vector<float>& values, bool half);

}  // namespace corolla
