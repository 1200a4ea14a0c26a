#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "base/meter.h"
#include "training/schedule.h"
#include "training/trainer.h"

namespace corolla {
namespace {

// The state between two steps.
struct Progress {
  std::vector<float> weights;
  std::unique_ptr<Optimizer> optimizer;
  std::vector<double> losses;
  double seconds = 0;
};

std::string memory_name(size_t i) { return "memory-" + std::to_string(i); }

Progress begin(const Job& job, std::vector<float> start, const std::vector<Range>& trained) {
  Progress now{std::move(start), nullptr, {}, 0};
  if (job.run.optimizer == "sgd")
    now.optimizer = std::make_unique<Sgd>(trained, job.run.weight_decay);
  else if (job.run.optimizer == "adamw")
    now.optimizer = std::make_unique<AdamW>(now.weights.size(), trained, job.run.weight_decay);
  else
    throw Error("unknown optimizer " + job.run.optimizer.substr(0, 40));
  const auto stored = job.checkpoint.load();
  if (!stored) return now;
  const auto values = [&](const std::string& name) {
    auto found = values_of<float>(find(stored->tensors, name, "the checkpoint"));
    if (found.size() != now.weights.size()) throw Error("the checkpoint is of another adapter");
    return found;
  };
  now.weights = values("weights");
  const auto memory = now.optimizer->memory();
  for (size_t i = 0; i < memory.size(); i++) *memory[i] = values(memory_name(i));
  now.losses = values_of<double>(find(stored->tensors, "losses", "the checkpoint"));
  now.optimizer->steps = static_cast<int64_t>(now.losses.size());
  now.seconds = std::stod(stored->facts.at("seconds"));
  return now;
}

void save(const Job& job, const Progress& now, double seconds) {
  Params tensors{{"weights", vector_of(now.weights)}, {"losses", vector_of(now.losses)}};
  const auto memory = now.optimizer->memory();
  for (size_t i = 0; i < memory.size(); i++) tensors[memory_name(i)] = vector_of(*memory[i]);
  job.checkpoint.save(tensors, {{"seconds", std::to_string(seconds)}});
}

// The mean loss of a batch over its targets, and its gradient.
double backward(const Job& job, const std::vector<uint32_t>& batch, const std::vector<float>& shown,
                std::vector<float>& gradient) {
  std::fill(gradient.begin(), gradient.end(), 0.0f);
  double total = 0;
  int64_t targets = 0;
  for (const uint32_t index : batch) {
    if (const std::string why = job.conditions.lapsed(); !why.empty()) throw Lapsed(why);
    total += job.engine.gradient(job.data[index], shown, gradient);
    targets += job.data[index].targets;
  }
  const auto share = static_cast<float>(1.0 / static_cast<double>(targets));
  for (float& value : gradient) value *= share;
  job.layout.scale_b(gradient, static_cast<float>(job.scaling));  // the program's B is s times B
  return total / static_cast<double>(targets);
}

Fit outcome(Progress now, const Seen& seen, const Meter& meter) {
  if (!finite(now.weights)) throw Error("weights are not finite after local training: lower lr");
  Fit fit;
  const double sum = std::accumulate(now.losses.begin(), now.losses.end(), 0.0);
  fit.metrics = {{"train_loss", sum / static_cast<double>(now.losses.size())},
                 {"target_tokens", static_cast<double>(seen.targets)},
                 {"local_steps", static_cast<double>(now.losses.size())}};
  meter.report(fit.metrics, now.losses);
  fit.examples = seen.examples.size();
  fit.weights = std::move(now.weights);
  return fit;
}

}  // namespace

Fit fit(const Job& job, std::vector<float> start, const std::vector<Range>& trained) {
  const int64_t count = steps_per_round(job.run, job.data.size());
  Batches batches(job.run, job.data.size(), job.seed);
  Progress now = begin(job, std::move(start), trained);
  Meter meter(now.seconds);
  std::vector<float> shown, gradient(now.weights.size());
  const auto done = static_cast<int64_t>(now.losses.size());
  Seen seen;
  for (int64_t step = 0; step < count; step++) {
    const std::vector<uint32_t> batch = batches.next();
    seen.add(job.data, batch);
    if (step < done) continue;
    const Stopwatch watch;
    shown = now.weights;
    job.layout.scale_b(shown, static_cast<float>(job.scaling));
    double loss = 0;
    try {
      loss = backward(job, batch, shown, gradient);
    } catch (const Lapsed&) {
      save(job, now, meter.seconds());
      throw;
    }
    if (!std::isfinite(loss))
      throw Error("loss is " + std::to_string(loss) + " at local step " +
                  std::to_string(step + 1) + ": lower lr");
    if (job.run.clip_norm) clip_norm(gradient, trained, *job.run.clip_norm);
    now.optimizer->step(now.weights, gradient, job.run.lr * rate(job.run, job.round, count, step));
    now.losses.push_back(loss);
    meter.step(watch.seconds());
    if (job.checkpoint.due()) save(job, now, meter.seconds());
  }
  return outcome(std::move(now), seen, meter);
}

}  // namespace corolla
