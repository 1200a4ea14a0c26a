// Local training of one client in one round: with gradients, or with forward passes alone. As
// client/training/first_order.py and client/training/zeroth_order.py, with micro-batches of one sequence.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "base/signs.h"
#include "training/checkpoint.h"
#include "training/conditions.h"
#include "training/engine.h"
#include "training/layout.h"
#include "training/settings.h"

namespace corolla {

// What both ways of training are given.
struct Job {
  Engine& engine;
  const Layout& layout;
  const std::vector<View>& data;
  const Run& run;
  double scaling;        // of B A
  double eps_low, eps_high;
  uint64_t seed;         // of this client and round
  int64_t round;
  Conditions& conditions;
  Checkpoint& checkpoint;
};

// On what steps were taken.
struct Seen {
  std::set<uint32_t> examples;
  int64_t targets = 0;

  void add(const std::vector<View>& data, const std::vector<uint32_t>& batch) {
    for (const uint32_t index : batch) {
      examples.insert(data[index].sequence->example);
      targets += data[index].targets;
    }
  }
};

using Metrics = std::map<std::string, double>;

struct Fit {
  std::vector<float> weights;  // the flat vector afterwards
  uint64_t examples = 0;
  Metrics metrics;
};

// AdamW or SGD on the ranges `trained`. Throws Error when the loss or the weights are not finite,
// Lapsed when the conditions lapse.
Fit fit(const Job& job, std::vector<float> start, const std::vector<Range>& trained);

struct Walk {
  std::vector<float> scalars;  // in the order of the queries, each a number of the type asked for
  float step = 0;
  uint64_t examples = 0;
  Metrics metrics;
};

// Two-sided differences along the directions of one key, whose number follows from the run. `half`:
// scalars are rounded to fp16 before they move the weights. Throws as `fit`.
Walk walk(const Job& job, std::vector<float> start, Key key, uint32_t pool, bool half);

}  // namespace corolla
