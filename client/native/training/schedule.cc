#include "training/schedule.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace corolla {
namespace {

constexpr int64_t kMostSteps = 1 << 20;

}  // namespace

int64_t steps_per_round(const Run& run, size_t sequences) {
  if (!run.local_epochs) return run.local_steps;
  const int64_t epoch = (static_cast<int64_t>(sequences) + run.batch_size - 1) / run.batch_size;
  if (epoch * *run.local_epochs > kMostSteps) throw Error("the task asks for too many steps");
  return epoch * *run.local_epochs;
}

Batches::Batches(const Run& run, size_t sequences, uint64_t seed)
    : shuffler_(derive(seed, {"order"})),
      sequences_(static_cast<uint32_t>(sequences)),
      size_(static_cast<size_t>(run.batch_size)) {}

std::vector<uint32_t> Batches::next() {
  if (at_ >= order_.size()) order_ = shuffler_.permutation(sequences_), at_ = 0;
  const size_t from = at_;
  at_ = std::min(from + size_, order_.size());
  return {order_.begin() + static_cast<ptrdiff_t>(from),
          order_.begin() + static_cast<ptrdiff_t>(at_)};
}

double rate(const Run& run, int64_t round, int64_t steps, int64_t step) {
  const auto done = static_cast<double>((round - 1) * steps + step);
  const auto total = static_cast<double>(run.rounds * steps);
  const double warmup = run.warmup_rounds * static_cast<double>(steps);
  if (done < warmup) return (done + 1) / std::ceil(warmup);
  const double progress = (done - warmup) / std::max(1.0, total - warmup);
  if (run.schedule == "linear") return 1 - progress;
  return run.schedule == "cosine" ? (1 + std::cos(3.141592653589793 * progress)) / 2 : 1.0;
}

float step_size(const Run& run, int64_t round, int64_t steps) {
  return static_cast<float>(-run.lr * rate(run, round, steps, steps / 2) /
                            static_cast<double>(run.queries));
}

}  // namespace corolla
