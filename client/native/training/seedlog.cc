#include "training/seedlog.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/files.h"
#include "base/hash.h"
#include "base/safetensors.h"
#include "base/seeds.h"
#include "base/signs.h"
#include "training/scalars.h"

namespace corolla {
namespace {

constexpr int kMostRows = 65536;
constexpr uint64_t kMostScalars = 1 << 24;  // of all rows, written out dense

void check(const v1::Log& log) {
  uint64_t scalars = 0;
  for (const v1::Scalars& row : log.rows()) scalars += row.size();
  if (log.rows_size() > kMostRows || scalars > kMostScalars)
    throw Error("the log has too many rows");
  if (log.number() < static_cast<uint32_t>(log.rows_size()))
    throw Error("the log ends before its rows do");
  for (const std::string* id : {&log.origin(), &log.since(), &log.version()})
    if (!is_hex(*id, 32)) throw Error("the log has a version that is none");
}

// The state that a file holds.
struct Held {
  std::string version;
  uint64_t number = 0;
  std::vector<float> weights;
};

std::optional<Held> from_file(const std::string& origin, const Layout& layout,
                              const std::filesystem::path& held) {
  std::error_code failed;
  if (!std::filesystem::exists(held, failed)) return {};
  try {
    Stored stored = load_tensors(held);
    if (stored.facts["origin"] != origin || stored.facts["digest"] != digest(stored.tensors))
      return {};
    return Held{stored.facts["version"], std::stoull(stored.facts["number"]),
                layout.flatten(stored.tensors)};
  } catch (const std::exception&) {  // damaged: it is sent again
    return {};
  }
}

// The rows of a log, and the version before each and after the last. Throws Error when they do not
// lead to the version that the log tells.
struct Chain {
  std::vector<Params> rows;
  std::vector<std::string> versions;
};

Chain chain(const v1::Log& log, uint32_t pool) {
  Chain made{{}, {log.since()}};
  for (const v1::Scalars& entry : log.rows()) {
    const std::string where = "log row " + std::to_string(made.rows.size());
    made.rows.push_back(load_scalars(entry, where));
    const std::vector<double> sums = scalars_of(made.rows.back());
    if (sums.size() != pool) throw Error(where + " is of another number of directions");
    if (!std::all_of(sums.begin(), sums.end(), usable))
      throw Error(where + " has a value that is not finite, or larger than 1e12");
    made.versions.push_back(after(made.versions.back(), made.rows.back()));
  }
  if (made.versions.back() != log.version())
    throw Error(std::to_string(log.rows_size()) + " rows from version " +
                log.since().substr(0, 8) + " do not lead to " + log.version().substr(0, 8) +
                ": the log has a gap or a foreign row");
  return made;
}

void apply(std::vector<float>& weights, const Params& row, Key key) {
  const double step = values_of<float>(find(row, "step", "a row of the log")).at(0);
  const Round round = prepared(key, scalars_of(row), step);
  replay(weights.data(), weights.data(), Type::fp32, 0, weights.size(), {round});
}

void keep(const std::filesystem::path& held, const v1::Log& log, const Layout& layout,
          const std::vector<float>& weights) {
  const Params tensors = layout.unflatten(weights, all);
  make_folder(held.parent_path());
  write_file(held, encode(tensors, {{"origin", log.origin()},
                                    {"version", log.version()},
                                    {"number", std::to_string(log.number())},
                                    {"digest", digest(tensors)}}));
}

std::optional<std::vector<float>> from_sent(const v1::Log& log, const Payload& sent,
                                            const Layout& layout, const std::string& model,
                                            uint64_t run_seed) {
  if (!log.start().empty()) {
    const auto start = sent.find("start");
    if (start == sent.end() || content_id(start->second) != log.start())
      throw Error("the snapshot does not match its content id");
    return layout.flatten(start->second);
  }
  const auto first = sent.find("first");
  if (log.since() != log.origin() || first == sent.end()) return {};
  const auto seed = static_cast<int64_t>(direction_seed(run_seed));
  const Params key{{"seed", tensor_of<int64_t>({seed}, {})}};
  const Payload state{{"start", first->second}, {"key", key}};
  const std::string own = origin(model, state);
  if (own != log.origin())
    throw Error("this device starts from version " + own.substr(0, 8) + ", the server from " +
                log.origin().substr(0, 8) + ": another base model, or another adapter on it");
  return layout.flatten(first->second);
}

}  // namespace

uint64_t direction_seed(uint64_t run_seed) { return derive(run_seed, {"directions"}); }

Followed follow(const v1::Log& log, const Payload& sent, const Layout& layout,
                const std::string& model, uint64_t run_seed, uint32_t pool,
                const std::filesystem::path& held) {
  check(log);
  const uint64_t before = log.number() - static_cast<uint64_t>(log.rows_size());
  if (log.since() == log.origin() && log.start().empty() && before)
    throw Error("the log ends at row " + std::to_string(log.number()) + " and has " +
                std::to_string(log.rows_size()));
  const Chain known = chain(log, pool);
  std::vector<float> weights;
  size_t next = 0;  // the first row to apply
  auto own = from_file(log.origin(), layout, held);
  const auto here = std::find(known.versions.rbegin(), known.versions.rend(),
                              own ? own->version : std::string());
  if (here != known.versions.rend()) {
    next = static_cast<size_t>(known.versions.rend() - here) - 1;
    if (own->number != before + next)
      throw Error("log ends at row " + std::to_string(log.number()) + ", here at " +
                  std::to_string(own->number + known.rows.size() - next));
    weights = std::move(own->weights);
  } else {
    auto start = from_sent(log, sent, layout, model, run_seed);
    if (!start) return {};
    weights = std::move(*start);
  }
  const bool changed = here == known.versions.rend() || next < known.rows.size();
  for (; next < known.rows.size(); next++)
    apply(weights, known.rows[next], {direction_seed(run_seed), before + next + 1});
  if (!finite(weights)) throw Error("the weights of the log are not finite");
  if (changed) keep(held, log, layout, weights);
  return {std::move(weights), log.number(), true};
}

}  // namespace corolla
