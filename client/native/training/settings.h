// The settings of a run as a task tells them: those that a device needs.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

namespace corolla {

struct Lora {
  int rank = 0;
  double alpha = 0;
  bool rslora = false;

  double scaling() const;  // the factor of B A
};

// As corolla/config/run.py, for the clients of one class.
struct Run {
  uint64_t seed = 0;
  std::string strategy, trainer;  // trainer: "first_order", "zeroth_order", or "" of the strategy
  uint32_t pool = 0;              // options.size, 0: not given
  std::string scalars;            // options.scalars, "": not given
  int64_t rounds = 1;
  std::string optimizer = "adamw", schedule = "cosine", estimator = "two_sided";
  double lr = 0, eps = 1e-3, weight_decay = 0, warmup_rounds = 0, dropout = 0;
  std::optional<double> clip_norm;
  int64_t local_steps = 0, batch_size = 0, queries = 1, max_length = 0;
  std::optional<int64_t> local_epochs;
};

struct Settings {
  Lora lora;
  std::string kind;  // the class, "" for none
  Run run;
};

// Throws Error for what is not the JSON of a task, a number out of all bounds, an unknown class,
// and for what a native client does not do: differential privacy of examples, codecs, other
// parameters than LoRA.
Settings read_settings(const std::string& config, const std::string& kind);

}  // namespace corolla
