// The client halves of the strategies that a native client has: see strategies/*.py.
#pragma once

#include <string>
#include <vector>

#include "base/tensors.h"
#include "training/trainer.h"

namespace corolla {

// What a strategy answers with: dense groups and scalar groups.
struct Update {
  Payload dense, scalars;
  uint64_t examples = 0;
  Metrics metrics;
};

// The strategies whose client half is here.
std::vector<std::string> strategies();

// How the clients of a run's class train. Throws Error for a strategy without a client half here.
std::string trainer_of(const Run& run);

// The directions of the strategy seed_pool.
uint32_t seed_pool_size(const Run& run);

// The adapter that a round starts from, of what was received: the global model. Throws Error when
// something of it is lacking. `log` is what the rows led to, where the task has a log.
std::vector<float> started(const Run& run, const Payload& received, const Layout& layout,
                           std::vector<float> log);

// Trains from `start`. `number` is that of the log's last row. Throws Error, Lapsed.
Update local(const Job& job, std::vector<float> start, const Payload& received, uint64_t number);

}  // namespace corolla
