#include "training/task.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/files.h"
#include "base/hash.h"
#include "base/safetensors.h"
#include "base/seeds.h"
#include "training/scalars.h"
#include "training/seedlog.h"
#include "training/shelf.h"
#include "training/strategies.h"

namespace corolla {
namespace {

constexpr uint32_t kSchema = 3;
constexpr int kCheckpoint = 1;  // version of what a checkpoint holds
constexpr int kMostCached = 4096, kMostScalarGroups = 64;
constexpr size_t kLongestError = 2000;
constexpr uintmax_t kLongestLog = 1 << 20;
constexpr unsigned kThreads = 2;  // more threads heat the phone without a speed-up

v1::Reply blank(const v1::Task& task, const std::string& client) {
  v1::Reply reply;
  reply.set_schema(kSchema);
  reply.set_run_id(task.run_id());
  reply.set_round(task.round());
  reply.set_base_version(task.base_version());
  reply.set_kind(task.kind());
  reply.set_client(client);
  reply.set_payload_sha256(sha256(""));
  return reply;
}

void check(const v1::Task& task, const std::string& payload) {
  if (task.schema() != kSchema)
    throw Error("message has schema " + std::to_string(task.schema()) + ", this version reads " +
                std::to_string(kSchema));
  if (task.payload_bytes() != payload.size() || task.payload_sha256() != sha256(payload))
    throw Error("payload does not match its checksum");
  if (!is_hex(task.run_id(), 32)) throw Error("the task has a run that is no id");
  if (task.cached_size() > kMostCached || task.scalars_size() > kMostScalarGroups)
    throw Error("the task has too many groups");
}

void check(const Manifest& manifest, const Assignment& assignment, const Settings& settings) {
  const std::string trainer = trainer_of(settings.run);
  const std::string needed = trainer == "first_order" ? "grad" : "loss";
  if (assignment.method != needed)
    throw Error("assigned method " + assignment.method + ", but class " +
                (settings.kind.empty() ? "of the run" : settings.kind) + " trains with " + trainer);
  if (settings.lora.rank != manifest.rank)
    throw Error("the run has rank " + std::to_string(settings.lora.rank) + ", the bundle " +
                std::to_string(manifest.rank) + ": assign another class or export again");
  if (settings.run.dropout > 0 && needed == "grad")
    throw Error("dropout is not for native clients: leave it out, or train with corolla client");
  manifest.program(assignment.program).method(assignment.method);
}

std::vector<View> views(const Data& data, int length) {
  std::vector<View> found;
  for (const Sequence& own : data.sequences) {
    View view{&own, std::min(own.ids.size(), static_cast<size_t>(length)), 0};
    for (size_t i = 1; i < view.length; i++) view.targets += own.labels[i] != kIgnore;
    if (view.targets) found.push_back(view);
  }
  if (found.empty()) throw Error("client has no example with a target left");
  return found;
}

uint64_t examples_of(const std::vector<View>& data) {
  std::vector<uint32_t> seen;
  for (const View& view : data) seen.push_back(view.sequence->example);
  std::sort(seen.begin(), seen.end());
  return static_cast<uint64_t>(std::unique(seen.begin(), seen.end()) - seen.begin());
}

std::string data_digest(const std::vector<View>& data) {
  Sha256 sha;
  const auto bytes = [](const std::vector<int32_t>& values, size_t count) {
    return std::string_view(reinterpret_cast<const char*>(values.data()), 4 * count);
  };
  for (const View& view : data) {
    sha.update(std::to_string(view.length) + "|" + std::to_string(view.sequence->example) + "|");
    sha.update(bytes(view.sequence->ids, view.length));
    sha.update(bytes(view.sequence->labels, view.length));
  }
  return sha.hex();
}

int threads() {
  return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, kThreads));
}

// All groups that a task brings or names; those that are lacking go into `missing`.
Payload received(const v1::Task& task, const std::string& payload, const Shelf& shelf,
                 std::vector<std::string>& missing) {
  Payload found = payload.empty() ? Payload{} : decode_payload(payload);
  for (const v1::Scalars& entry : task.scalars()) {
    if (found.count(entry.group())) throw Error("group " + entry.group() + " is there twice");
    found[entry.group()] = load_scalars(entry, "scalar group " + entry.group());
  }
  for (const v1::CachedGroup& entry : task.cached()) {
    if (const auto sent = found.find(entry.group()); sent != found.end())
      shelf.keep(entry.group(), sent->second, entry.id());
    else if (auto held = shelf.group(entry.id()))
      found[entry.group()] = std::move(*held);
    else
      missing.push_back(entry.group());
  }
  return found;
}

Groups cached(const v1::Task& task) {
  Groups groups;
  for (const v1::CachedGroup& entry : task.cached()) groups[entry.group()] = entry.id();
  return groups;
}

void note(const std::filesystem::path& state, const nlohmann::json& line) {
  const std::filesystem::path file = state / "log.jsonl";
  std::error_code failed;
  if (std::filesystem::file_size(file, failed) > kLongestLog && !failed)
    std::filesystem::rename(file, state / "log-1.jsonl", failed);
  std::ofstream(file, std::ios::app) << line.dump() << "\n";
}

void lacking(v1::Reply& reply, const std::vector<std::string>& missing) {
  std::string names;
  for (const std::string& name : missing) {
    reply.add_missing(name);
    names += (names.empty() ? "" : ", ") + name;
  }
  reply.set_error(names + ": not held here");
}

}  // namespace

Trainer::Trainer(const Manifest& manifest, std::filesystem::path bundle, Data data,
                 std::filesystem::path state)
    : manifest_(manifest),
      bundle_(std::move(bundle)),
      data_(std::move(data)),
      state_(std::move(state)) {
  for (const Sequence& own : data_.sequences)  // a program reads what lies beyond its embeddings
    for (const auto* tokens : {&own.ids, &own.labels})
      for (const int32_t token : *tokens)
        if (token >= manifest_.vocab)
          throw Error("token " + std::to_string(token) + " is none of the " +
                      std::to_string(manifest_.vocab) + " of " + manifest_.model +
                      ": make tokens with the bundle's tokenizer");
}

uint64_t Trainer::examples() const { return data_.examples(); }

std::vector<std::string> Trainer::missing(const std::string& run, const Groups& groups) {
  const Shelf shelf(state_, run);
  std::vector<std::string> names;
  for (const auto& [group, content] : groups)
    if (!shelf.group(content)) names.push_back(group);
  return names;
}

void Trainer::train(const v1::Task& task, const std::string& payload, const Assignment& assignment,
                    Conditions& conditions, Answer& answer) {
  Settings settings = read_settings(task.config(), assignment.kind);
  const Run& run = settings.run;
  if (task.round() < 1 || task.round() > settings.run.rounds)
    throw Error("the task has no usable round: expected a whole number from 1 to " +
                std::to_string(settings.run.rounds) + ", found " + std::to_string(task.round()));
  check(manifest_, assignment, settings);
  const Shelf shelf(state_, task.run_id());
  shelf.prune(cached(task));  // first: what is not named any more makes room
  std::vector<std::string> missing;
  Payload sent = received(task, payload, shelf, missing);
  const Layout layout(manifest_.adapter);
  Followed followed;
  if (missing.empty() && run.strategy == "seed_pool") {
    if (!task.has_log()) throw Error("the task has no log");
    followed = follow(task.log(), sent, layout, manifest_.model_sha256, run.seed,
                      seed_pool_size(run), shelf.log());
    if (!followed.known) missing.push_back("log");
  }
  if (!missing.empty()) return lacking(answer.header, missing);
  std::vector<float> start = started(run, sent, layout, std::move(followed.weights));
  for (const char* used : {"adapter", "A", "first", "start"}) sent.erase(used);
  nlohmann::json line{{"event", "round"},
                      {"run", task.run_id()},
                      {"round", task.round()},
                      {"adapter_sha256", digest(layout.unflatten(start, all))},
                      {"program", assignment.program},
                      {"method", assignment.method}};
  if (task.has_log()) line["version"] = task.log().version();
  note(state_, line);

  int length = std::min<int64_t>(manifest_.length, run.max_length);
  if (assignment.length > 0) length = std::min(length, assignment.length);
  const std::vector<View> data = views(data_, length);
  const std::string& client = answer.header.client();
  const nlohmann::json key{
      kCheckpoint,       task.run_id(),     task.round(),          task.base_version(),
      client,            settings.kind,     assignment.program,    assignment.method,
      length,            data_digest(data), sha256(task.config()), manifest_.model_sha256};
  Checkpoint checkpoint(state_ / "checkpoint.safetensors", sha256(key.dump()));
  Engine engine(manifest_, bundle_, assignment.program, assignment.method, threads());
  const Program& program = manifest_.program(assignment.program);
  const uint64_t seed = derive(run.seed, {"client", client, static_cast<int64_t>(task.round())});
  const Job job{engine, layout, data, run, settings.lora.scaling(), program.eps_low,
                program.eps_high, seed, task.round(), conditions, checkpoint};
  Update update = local(job, std::move(start), sent, followed.number);
  checkpoint.clear();
  update.metrics["skipped"] = static_cast<double>(data_.examples() - examples_of(data));
  answer.header.set_num_examples(update.examples);
  for (const auto& [name, value] : update.metrics)
    if (std::isfinite(value)) (*answer.header.mutable_metrics())[name] = value;
  for (const auto& [group, params] : update.scalars)
    *answer.header.add_scalars() = dump_scalars(params, group);
  if (!update.dense.empty()) answer.payload = encode_payload(update.dense);
}

Answer Trainer::answer(const std::string& client, const v1::Task& task, const std::string& payload,
                       const Assignment& assignment, Conditions& conditions) {
  Answer answer{blank(task, client), ""};
  std::string why;
  try {
    check(task, payload);
    if (!task.model_sha256().empty() && task.model_sha256() != manifest_.model_sha256)
      throw Error("this device has base model " + manifest_.model_sha256.substr(0, 12) +
                  ", the run is of " + task.model_sha256().substr(0, 12) +
                  ": give it a bundle of the same one");
    if (task.kind() == v1::KIND_HELLO) {
      answer.header.set_num_examples(examples());
      answer.header.set_model_sha256(manifest_.model_sha256);
    } else if (task.kind() == v1::KIND_TRAIN) {
      train(task, payload, assignment, conditions, answer);
    } else {
      throw Error("a native client only trains");
    }
  } catch (const Lapsed&) {
    throw;
  } catch (const DiskError&) {  // names a file: for the owner alone
    throw;
  } catch (const Error& error) {
    why = error.what();
  } catch (const std::bad_alloc&) {
    why = "out of memory: lower the length of sequences";
  } catch (const std::exception&) {  // its text may be of the data
    why = "task cannot be done here: its numbers or names are not usable";
  }
  if (!why.empty()) {
    answer = {blank(task, client), ""};
    answer.header.set_error(one_line(why).substr(0, kLongestError));
  }
  answer.header.set_payload_bytes(answer.payload.size());
  answer.header.set_payload_sha256(sha256(answer.payload));
  return answer;
}

std::string with_groups(v1::Task& task, const std::string& payload,
                        const std::vector<std::string>& groups) {
  if (groups.empty()) return payload;
  Payload all = payload.empty() ? Payload{} : decode_payload(payload);
  for (const std::string& bytes : groups) {
    Payload one = decode_payload(bytes);
    all.merge(one);
    if (!one.empty()) throw Error("group " + one.begin()->first + " was sent twice");
  }
  std::string whole = encode_payload(all);
  task.set_payload_bytes(whole.size());
  task.set_payload_sha256(sha256(whole));
  return whole;
}

}  // namespace corolla
