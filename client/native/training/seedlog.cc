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
constexpr uint64_t kMostScalars = 1 << 24;  // of all rows

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

// A row of a log, written out dense: all at once they would be a hundred times the message.
Params row_of(const v1::Log& log, size_t at) {
  return load_scalars(log.rows(static_cast<int>(at)), "log row " + std::to_string(at));
}

// The version before each row of a log and after the last. Throws Error when they do not lead to
// the version that the log tells.
std::vector<std::string> versions(const v1::Log& log, uint32_t pool) {
  std::vector<std::string> made{log.since()};
  for (size_t at = 0; at < static_cast<size_t>(log.rows_size()); at++) {
    const std::string where = "log row " + std::to_string(at);
    const Params row = row_of(log, at);
    const std::vector<double> sums = scalars_of(row);
    if (sums.size() != pool) throw Error(where + " is of another number of directions");
    if (!std::all_of(sums.begin(), sums.end(), usable))
      throw Error(where + " has a value that is not finite, or larger than 1e12");
    made.push_back(after(made.back(), row));
  }
  if (made.back() != log.version())
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
  const std::vector<std::string> known = versions(log, pool);
  const size_t rows = known.size() - 1;
  std::vector<float> weights;
  size_t next = 0;  // the first row to apply
  auto own = from_file(log.origin(), layout, held);
  const auto here = std::find(known.rbegin(), known.rend(),
                              own ? own->version : std::string());
  if (here != known.rend()) {
    next = static_cast<size_t>(known.rend() - here) - 1;
    if (own->number != before + next)
      throw Error("log ends at row " + std::to_string(log.number()) + ", here at " +
                  std::to_string(own->number + rows - next));
    weights = std::move(own->weights);
  } else {
    auto start = from_sent(log, sent, layout, model, run_seed);
    if (!start) return {};
    weights = std::move(*start);
  }
  const bool changed = here == known.rend() || next < rows;
  for (; next < rows; next++)
    apply(weights, row_of(log, next), {direction_seed(run_seed), before + next + 1});
  if (!finite(weights)) throw Error("the weights of the log are not finite");
  if (changed) keep(held, log, layout, weights);
  return {std::move(weights), log.number(), true};
}

}  // namespace corolla
