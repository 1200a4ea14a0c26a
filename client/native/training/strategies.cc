#include "training/strategies.h"

#include "training/scalars.h"
#include "training/seedlog.h"

namespace corolla {
namespace {

constexpr uint32_t kSeedPool = 512, kMixedPool = 4096;  // sizes where the run does not say

const Params& group(const Payload& received, const std::string& name) {
  const auto found = received.find(name);
  if (found == received.end()) throw Error("the task lacks group " + name);
  return found->second;
}

Update differences(const Job& job, std::vector<float> start,
                   const std::function<bool(const Place&)>& trained) {
  Fit made = fit(job, start, job.layout.ranges(trained));
  for (size_t i = 0; i < start.size(); i++) made.weights[i] -= start[i];
  return {{{"adapter", job.layout.unflatten(made.weights, trained)}},
          {},
          made.examples,
          std::move(made.metrics)};
}

Update scalars(const Job& job, std::vector<float> start, Key key, uint32_t pool, bool half) {
  Walk made = walk(job, std::move(start), key, pool, half);
  Params upload{{"scalars", scalars_tensor(made.scalars, half)},
                {"step", tensor_of<float>({made.step}, {})},
                {"seed", tensor_of<int64_t>({static_cast<int64_t>(job.seed)}, {})}};
  return {{}, {{"scalars", std::move(upload)}}, made.examples, std::move(made.metrics)};
}

Key mixed_key(const Payload& received) {
  const auto key = values_of<int64_t>(find(group(received, "key"), "key", "the task"));
  if (key.size() != 2) throw Error("the task has a key that is not two numbers");
  return {static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])};
}

bool in_half(const Run& run) {
  if (!run.scalars.empty() && run.scalars != "fp16" && run.scalars != "fp32")
    throw Error("scalars must be fp16 or fp32");
  return run.scalars != "fp32";
}

}  // namespace

std::vector<std::string> strategies() {
  return {"fedavg",     "fedavgm",  "fedadam", "fedyogi",
          "fedadagrad", "ffa_lora", "mixed",   "seed_pool"};
}

std::string trainer_of(const Run& run) {
  std::string known;
  for (const std::string& name : strategies()) {
    known += (known.empty() ? "" : ", ") + name;
    if (name != run.strategy) continue;
    if (!run.trainer.empty() && run.trainer != "first_order" && run.trainer != "zeroth_order")
      throw Error("unknown trainer " + run.trainer.substr(0, 40));
    const std::string usual = name == "seed_pool" ? "zeroth_order" : "first_order";
    const std::string wanted = run.trainer.empty() ? usual : run.trainer;
    if (name != "mixed" && wanted != usual)
      throw Error("strategy " + name + " has no clients that train with " + wanted);
    return wanted;
  }
  throw Error("strategy " + run.strategy.substr(0, 80) + " is not for native clients: they have " +
              known);
}

std::vector<float> started(const Run& run, const Payload& received, const Layout& layout,
                           std::vector<float> log) {
  if (run.strategy == "seed_pool") return log;
  if (run.strategy != "ffa_lora") return layout.flatten(group(received, "adapter"));
  Params both = group(received, "A");
  for (const auto& [name, tensor] : group(received, "adapter")) both[name] = tensor;
  return layout.flatten(both);
}

Update local(const Job& job, std::vector<float> start, const Payload& received, uint64_t number) {
  if (job.run.strategy == "seed_pool") {
    const Key key{direction_seed(job.run.seed), number + 1};
    return scalars(job, std::move(start), key, seed_pool_size(job.run), in_half(job.run));
  }
  if (trainer_of(job.run) == "zeroth_order") {
    const uint32_t pool = job.run.pool ? job.run.pool : kMixedPool;
    return scalars(job, std::move(start), mixed_key(received), pool, false);
  }
  if (job.run.strategy == "ffa_lora") return differences(job, std::move(start), only_b);
  return differences(job, std::move(start), all);
}

uint32_t seed_pool_size(const Run& run) { return run.pool ? run.pool : kSeedPool; }

}  // namespace corolla
