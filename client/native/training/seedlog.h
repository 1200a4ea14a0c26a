// The seed log that a phone follows: it keeps the weights after the last row that it knows, not the
// rows, and checks every version on the way. As client/training/worker.py and corolla/directions/seedlog.py.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/tensors.h"
#include "corolla/proto/update.pb.h"
#include "training/layout.h"

namespace corolla {

// A state that a log led to.
struct Followed {
  std::vector<float> weights;
  uint64_t number = 0;  // of the last row
  bool known = false;   // false: what the rows continue is not held here
};

// What the rows of a task lead to, from the file `held`, from the group "start" (a snapshot) or
// from "first" (the fresh adapter) of what was sent; it is then written to `held`. `pool` is the
// number of directions. Throws Error when the start is not the server's, or the rows do not lead to
// its version.
Followed follow(const v1::Log& log, const Payload& sent, const Layout& layout,
                const std::string& model_sha256, uint64_t run_seed, uint32_t pool,
                const std::filesystem::path& held);

// The seed of the signs of a run.
uint64_t direction_seed(uint64_t run_seed);

}  // namespace corolla
