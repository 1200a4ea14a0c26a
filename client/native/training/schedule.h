// How many steps a client takes in a round, on which sequences, at which rate: as
// corolla/config/schedule.py.
#pragma once

#include <cstdint>
#include <vector>

#include "base/seeds.h"
#include "training/settings.h"

namespace corolla {

int64_t steps_per_round(const Run& run, size_t sequences);

// The sequences of one step after the other, every epoch in a new order. Of the steps, whose number
// a server chooses, one epoch is laid out at a time.
class Batches {
 public:
  Batches(const Run& run, size_t sequences, uint64_t seed);

  std::vector<uint32_t> next();

 private:
  Shuffler shuffler_;
  uint32_t sequences_;
  size_t size_, at_ = 0;
  std::vector<uint32_t> order_;
};

// The factor of lr at a step of a round, which counts from 1.
double rate(const Run& run, int64_t round, int64_t steps, int64_t step);

// -lr / queries of a zeroth-order client in a round, as it travels.
float step_size(const Run& run, int64_t round, int64_t steps);

}  // namespace corolla
