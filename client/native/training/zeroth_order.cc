#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/half.h"
#include "base/meter.h"
#include "training/schedule.h"
#include "training/trainer.h"

namespace corolla {
namespace {

constexpr size_t kMostScalars = 65536;  // that a message takes

// How far a query looks, and what its difference is multiplied by.
struct Reach {
  double distance = 0, factor = 1;
};

// The state between two steps.
struct Progress {
  std::vector<float> point;
  std::vector<float> scalars;
  std::vector<double> losses;  // two for each query
  int64_t skipped = 0;
  double seconds = 0;
};

// A difference at distance r eps times this has no bias from third derivatives. Mi et al., arXiv
// 2505.18886.
double kernel(double r) { return 15.0 / 4 * r * (5 - 7 * r * r); }

// As it is used: of few bits, as in Corolla, and where this base gives sound differences.
double used_eps(const Job& job) {
  const double eps = rounded_to_bf16(static_cast<float>(job.run.eps));
  return std::min(std::max(eps, job.eps_low), job.eps_high);
}

std::vector<Reach> reaches(const Job& job, double eps, size_t count) {
  if (job.run.estimator == "two_sided") return std::vector<Reach>(count, Reach{eps, 1.0});
  if (job.run.estimator != "kerzoo")
    throw Error("unknown estimator " + job.run.estimator.substr(0, 40));
  std::vector<Reach> made;
  for (const uint64_t word : words({job.seed, 0}, 0, count, 3)) {
    const double r = 2.0 * (static_cast<double>(word >> 11) * 0x1p-53) - 1.0;
    made.push_back({eps * r, kernel(r)});
  }
  return made;
}

Progress begin(const Job& job, std::vector<float> start, size_t queries) {
  Progress now{std::move(start), {}, {}, 0, 0};
  if (const auto stored = job.checkpoint.load()) {
    auto point = values_of<float>(find(stored->tensors, "point", "the checkpoint"));
    if (point.size() != now.point.size()) throw Error("the checkpoint is of another adapter");
    now.point = std::move(point);
    now.scalars = values_of<float>(find(stored->tensors, "scalars", "the checkpoint"));
    now.losses = values_of<double>(find(stored->tensors, "losses", "the checkpoint"));
    now.skipped = std::stoll(stored->facts.at("skipped"));
    now.seconds = std::stod(stored->facts.at("seconds"));
  }
  now.scalars.reserve(queries);
  now.losses.reserve(2 * queries);
  return now;
}

void save(const Job& job, const Progress& now, double seconds) {
  job.checkpoint.save({{"point", vector_of(now.point)},
                       {"scalars", vector_of(now.scalars)},
                       {"losses", vector_of(now.losses)}},
                      {{"skipped", std::to_string(now.skipped)},
                       {"seconds", std::to_string(seconds)}});
}

double forward(const Job& job, const std::vector<uint32_t>& batch,
               const std::vector<float>& shown) {
  double total = 0;
  int64_t targets = 0;
  for (const uint32_t index : batch) {
    if (const std::string why = job.conditions.lapsed(); !why.empty()) throw Lapsed(why);
    total += job.engine.loss(job.data[index], shown);
    targets += job.data[index].targets;
  }
  return total / static_cast<double>(targets);
}

float rounded(double slope, bool half) {
  const auto value = static_cast<float>(slope);
  return half ? from_fp16(to_fp16(value)) : value;
}

// One step's queries on one batch, along directions of one key.
class Looker {
 public:
  Looker(const Job& job, Key key, double eps, bool half, Meter& meter)
      : job_(job), key_(key), eps_(eps), half_(half), meter_(meter) {}

  // The slope along a direction; its two losses are added to `losses`.
  float slope(const std::vector<float>& point, uint32_t direction, const Reach& reach,
              const std::vector<uint32_t>& batch, std::vector<double>& losses) {
    const double above = seen(point, direction, reach.distance, batch);
    const double below = seen(point, direction, -reach.distance, batch);
    losses.insert(losses.end(), {above, below});
    return rounded(reach.factor * (above - below) / (2 * eps_), half_);
  }

  void move(std::vector<float>& point, const std::vector<Term>& terms) {
    const Stopwatch watch;
    add(point.data(), point.data(), Type::fp32, 0, point.size(), key_, terms);
    meter_.perturb(watch.seconds());
  }

 private:
  double seen(const std::vector<float>& point, uint32_t direction, double distance,
              const std::vector<uint32_t>& batch) {
    const Stopwatch watch;
    shown_.resize(point.size());
    add(shown_.data(), point.data(), Type::fp32, 0, point.size(), key_,
        {{direction, static_cast<float>(distance)}});
    job_.layout.scale_b(shown_, static_cast<float>(job_.scaling));
    meter_.perturb(watch.seconds());
    return forward(job_, batch, shown_);
  }

  const Job& job_;
  Key key_;
  double eps_;
  bool half_;
  Meter& meter_;
  std::vector<float> shown_;
};

// The moves of a step, each direction once, in the order in which they were looked along.
std::vector<Term> update(const std::vector<uint32_t>& directions, const std::vector<float>& scalars,
                         size_t from, float step) {
  std::vector<std::pair<uint32_t, double>> sums;
  for (size_t query = from; query < scalars.size(); query++) {
    if (!std::isfinite(scalars[query])) continue;
    const uint32_t k = directions[query];
    const auto same = std::find_if(sums.begin(), sums.end(), [k](auto& s) { return s.first == k; });
    const double change = static_cast<double>(step) * scalars[query];
    if (same == sums.end())
      sums.emplace_back(k, 0.0 + change);
    else
      same->second += change;
  }
  std::vector<Term> terms;
  for (const auto& [k, sum] : sums) {
    if (!(std::abs(sum) < 1e30)) throw Error("a step of " + std::to_string(sum) + ": lower lr");
    terms.push_back({k, static_cast<float>(sum)});
  }
  return terms;
}

Walk outcome(Progress now, int64_t steps, const Seen& seen, bool half, const Meter& meter) {
  const auto count = static_cast<double>(now.scalars.size());
  if (2 * static_cast<double>(now.skipped) > count)
    throw Error(std::to_string(now.skipped) + " of " + std::to_string(now.scalars.size()) +
                " scalars are not finite in " + (half ? "torch.float16" : "torch.float32") +
                ": lower lr or raise eps");
  Walk walk;
  std::vector<double> known;
  for (const double loss : now.losses)
    if (std::isfinite(loss)) known.push_back(loss);
  const double sum = std::accumulate(known.begin(), known.end(), 0.0);
  const auto zeros = std::count(now.scalars.begin(), now.scalars.end(), 0.0f);
  walk.metrics = {{"train_loss", sum / static_cast<double>(known.size())},
                  {"target_tokens", static_cast<double>(seen.targets)},
                  {"local_steps", static_cast<double>(steps)},
                  {"skipped_scalars", static_cast<double>(now.skipped)},
                  {"zero_scalars", static_cast<double>(zeros - now.skipped)},
                  {"scalars", count}};
  meter.report(walk.metrics, known);
  walk.examples = seen.examples.size();
  walk.scalars = std::move(now.scalars);
  return walk;
}

}  // namespace

Walk walk(const Job& job, std::vector<float> start, Key key, uint32_t pool, bool half) {
  const int64_t steps = steps_per_round(job.run, job.data.size());
  Batches batches(job.run, job.data.size(), job.seed);
  const auto per_step = static_cast<size_t>(job.run.queries);
  const size_t queries = static_cast<size_t>(steps) * per_step;
  if (queries > kMostScalars) throw Error("the task asks for too many scalars");
  const auto directions = choices(job.seed, queries, pool);
  const double eps = used_eps(job);
  const auto reach = reaches(job, eps, queries);
  const float step = step_size(job.run, job.round, steps);
  Progress now = begin(job, std::move(start), queries);
  Meter meter(now.seconds);
  Looker looker(job, key, eps, half, meter);
  const auto done = static_cast<int64_t>(now.scalars.size() / per_step);
  Seen seen;
  for (int64_t at = 0; at < steps; at++) {
    const std::vector<uint32_t> batch = batches.next();
    seen.add(job.data, batch);
    if (at < done) continue;
    const Stopwatch watch;
    const size_t from = now.scalars.size(), told = now.losses.size();
    try {
      for (size_t query = from; query < from + per_step; query++)
        now.scalars.push_back(
            looker.slope(now.point, directions[query], reach[query], batch, now.losses));
    } catch (const Lapsed&) {  // what this step has done is done again
      now.scalars.resize(from);
      now.losses.resize(told);
      save(job, now, meter.seconds());
      throw;
    }
    looker.move(now.point, update(directions, now.scalars, from, step));
    for (size_t query = from; query < from + per_step; query++)
      if (!std::isfinite(now.scalars[query])) now.scalars[query] = 0.0f, now.skipped++;
    meter.step(watch.seconds());
    if (job.checkpoint.due()) save(job, now, meter.seconds());
  }
  Walk made = outcome(std::move(now), steps, seen, half, meter);
  made.step = step;
  return made;
}

}  // namespace corolla
