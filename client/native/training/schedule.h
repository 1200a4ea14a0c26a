// How many steps a client takes in a round, on which sequences, at which rate: as
// corolla/config/schedule.py.
#pragma once

#include <cstdint>
#include <vector>

#include "training/settings.h"

namespace corolla {

int64_t steps_per_round(const Run& run, size_t sequences);

// The sequences of each step: every epoch in a new order.
std::vector<std::vector<uint32_t>> batches(const Run& run, size_t sequences, uint64_t seed);

// The factor of lr at a step of a round, which counts from 1.
double rate(const Run& run, int64_t round, int64_t steps, int64_t step);

// -lr / queries of a zeroth-order client in a round, as it travels.
float step_size(const Run& run, int64_t round, int64_t steps);

}  // namespace corolla
