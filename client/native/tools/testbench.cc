// corolla-native-check: what the tests ask of the parts of the native client, on a terminal.
//
//   vectors FILE                    all of proto/signs-v1.json; names the first that differs
//   self                            the known answers that a device checks before it takes part
//   derive JSON                     the seed of [run seed, part of a purpose, ...]
//   permutation SEED N [TIMES]      orders as torch.randperm draws them, one JSON list a line
//   half FILE                       raw fp32 numbers -> fp16, bf16, fp16 widened, as JSON of bits
//   hash FILE SIZE                  sha256, blake2b of SIZE bytes, crc32
//   digest FILE                     tree digest, content id and metadata of a safetensors file
//   copy FILE OUT                   read and write again
//   payload FILE                    group -> tree digest, of an encoded payload
//   after VERSION FILE              the version that the row in a safetensors file leads to
//   origin BASE FILE                the version of a first state: an encoded payload
//   replay FILE OUT POOL SEED NUM   the flat vector "w" after the tensors "row-*", from row NUM on
//   optimiser NAME DECAY CLIP FILE  JSON {"weights", "gradients", "rates"} -> weights; CLIP 0: none
//   walk FILE                       the JSON of schedule: steps, and the bytes that going through
//                                   them takes
//   schedule FILE                   JSON {"run", "sequences", "seed", "round"} -> steps and rates
//   settings FILE                   lines of JSON {"config", "class"} -> why each is refused, or ""
//
// With an engine also:
//   scalars FILE                    a packed Scalars -> what it says, and packed again (hex)
//   tokens FILE [VOCABULARY]        sequences, targets and examples of a token file
//   losses BUNDLE PROGRAM METHOD TOKENS ADAPTER [LENGTH]
//                                   of each sequence, with the safetensors ADAPTER at scaling 1
//   measure BUNDLE PROGRAM METHOD LENGTH STEPS [THREADS]
//                                   what steps cost, without a network in the process
//   read KIND FILE                  cases of bytes, with their sizes before them: how many of them
//                                   are read or refused, and the bytes that takes (check_bytes.cc)
//   answer BUNDLE TOKENS STATE CLIENT TASK PAYLOAD ASSIGNMENT OUT_HEADER OUT_PAYLOAD [PASSES]
//                                   a whole task; with PASSES the conditions lapse after so many
//
// Exit code 0, 1 with one line, or 2 for wrong usage.
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "base/half.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/meter.h"
#include "base/safetensors.h"
#include "base/seeds.h"
#include "base/signs.h"
#include "tools/selfcheck.h"
#include "tools/testbench.h"
#include "training/optimizer.h"
#include "training/schedule.h"

namespace corolla {
namespace {

using nlohmann::json;

void derive_all(const Arguments& given) {
  const json list = parse_json(given.at(1), "the list");
  Purpose purpose;
  for (size_t i = 1; i < list.size(); i++)
    if (list[i].is_string())
      purpose.emplace_back(list[i].get<std::string>());
    else
      purpose.emplace_back(list[i].get<int64_t>());
  std::cout << derive(list.at(0).get<uint64_t>(), purpose) << "\n";
}

void permutations(const Arguments& given) {
  Shuffler shuffler(static_cast<uint32_t>(std::stoul(given.at(1))));
  const int times = given.size() > 3 ? std::stoi(given[3]) : 1;
  for (int i = 0; i < times; i++)
    std::cout << json(shuffler.permutation(static_cast<uint32_t>(std::stoul(given.at(2))))) << "\n";
}

void halves(const Arguments& given) {
  const std::string bytes = slurp(given.at(1));
  json fp16 = json::array(), bf16 = json::array(), widened = json::array();
  for (size_t i = 0; i + 4 <= bytes.size(); i += 4) {
    float x;
    std::memcpy(&x, bytes.data() + i, 4);
    fp16.push_back(to_fp16(x));
    bf16.push_back(bits_of_float(rounded_to_bf16(x)));
    widened.push_back(bits_of_float(from_fp16(to_fp16(x))));
  }
  std::cout << json{{"fp16", fp16}, {"bf16", bf16}, {"widened", widened}} << "\n";
}

void hashes(const Arguments& given) {
  const std::string bytes = slurp(given.at(1));
  std::cout << sha256(bytes) << " " << hex(blake2b(bytes, std::stoul(given.at(2)))) << " "
            << crc32(bytes) << "\n";
}

void digests(const Arguments& given) {
  const Stored found = load_tensors(given.at(1));
  std::cout << json{{"digest", digest(found.tensors)},
                    {"content", content_id(found.tensors)},
                    {"facts", found.facts}}
            << "\n";
}

void copy(const Arguments& given) {
  const Stored found = load_tensors(given.at(1));
  spill(given.at(2), encode(found.tensors, found.facts));
}

void payloads(const Arguments& given) {
  const Payload found = decode_payload(slurp(given.at(1)));
  json told = json::object();
  for (const auto& [group, params] : found) told[group] = digest(params);
  std::cout << json{{"groups", told}, {"digest", digest(found)}} << "\n";
}

void replays(const Arguments& given) {
  Params tensors = load_tensors(given.at(1)).tensors;
  auto w = values_of<float>(find(tensors, "w", "the file"));
  const uint64_t seed = std::stoull(given.at(4));
  uint64_t number = std::stoull(given.at(5));
  for (const auto& [name, tensor] : tensors) {
    if (name.rfind("row-", 0)) continue;
    const auto sums = values_of<float>(tensor);
    if (sums.size() != std::stoul(given.at(3))) throw Error(name + " has another size");
    replay(w.data(), w.data(), Type::fp32, 0, w.size(),
           {prepared({seed, number++}, {sums.begin(), sums.end()}, 1.0)});
  }
  spill(given.at(2), encode({{"w", vector_of(w)}}, {}));
}

void optimise(const Arguments& given) {
  const json told = parse_json(slurp(given.at(4)), "the file");
  auto weights = told["weights"].get<std::vector<float>>();
  const double decay = std::stod(given.at(2)), clip = std::stod(given.at(3));
  const std::vector<Range> whole{{0, weights.size()}};
  std::unique_ptr<Optimizer> optimizer;
  if (given.at(1) == "sgd")
    optimizer = std::make_unique<Sgd>(whole, decay);
  else
    optimizer = std::make_unique<AdamW>(weights.size(), whole, decay);
  for (size_t step = 0; step < told["rates"].size(); step++) {
    auto gradient = told["gradients"][step].get<std::vector<float>>();
    if (clip > 0) clip_norm(gradient, whole, clip);
    optimizer->step(weights, gradient, told["rates"][step].get<double>());
  }
  std::cout << json(weights) << "\n";
}

Settings scheduled(const json& told) {
  const json lora{{"rank", 8}, {"alpha", 16.0}, {"rslora", false}};
  return read_settings(json{{"lora", lora}, {"run", told["run"]}}.dump(), told.value("class", ""));
}

void walks(const Arguments& given) {
  const json told = parse_json(slurp(given.at(1)), "the file");
  const Settings settings = scheduled(told);
  const auto sequences = told["sequences"].get<size_t>();
  const uint64_t before = peak_rss();
  const int64_t steps = steps_per_round(settings.run, sequences);
  Batches batches(settings.run, sequences, told["seed"].get<uint64_t>());
  uint64_t sum = 0;
  for (int64_t step = 0; step < steps; step++) sum += batches.next().size();
  std::cout << json{{"steps", steps}, {"sequences", sum}, {"grown", peak_rss() - before}} << "\n";
}

void schedules(const Arguments& given) {
  const json told = parse_json(slurp(given.at(1)), "the file");
  const Settings settings = scheduled(told);
  const auto sequences = told["sequences"].get<size_t>();
  const auto round = told["round"].get<int64_t>();
  const int64_t steps = steps_per_round(settings.run, sequences);
  Batches batches(settings.run, sequences, told["seed"].get<uint64_t>());
  json rates = json::array(), shown = json::array();
  for (int64_t step = 0; step < steps; step++) {
    rates.push_back(rate(settings.run, round, steps, step));
    shown.push_back(batches.next());
  }
  std::cout << json{{"batches", shown},
                    {"rates", rates},
                    {"step", step_size(settings.run, round, steps)}}
            << "\n";
}

void settings(const Arguments& given) {
  std::istringstream lines(slurp(given.at(1)));
  for (std::string line; std::getline(lines, line);) {
    const json told = parse_json(line, "the line");
    std::string why;
    try {
      read_settings(told["config"].get<std::string>(), told["class"].get<std::string>());
    } catch (const Error& error) {
      why = error.what();
    }
    std::cout << json(why) << "\n";
  }
}

const Commands kCommands = {
    {"vectors", {2, [](const Arguments& given) { check_vectors(slurp(given.at(1))); }}},
    {"self", {1, [](const Arguments&) { check_signs(); }}},
    {"derive", {2, derive_all}},
    {"permutation", {3, permutations}},
    {"half", {2, halves}},
    {"hash", {3, hashes}},
    {"digest", {2, digests}},
    {"copy", {3, copy}},
    {"payload", {2, payloads}},
    {"after", {3, [](const Arguments& given) {
       std::cout << after(given.at(1), load_tensors(given.at(2)).tensors) << "\n";
     }}},
    {"origin", {3, [](const Arguments& given) {
       std::cout << origin(given.at(1), decode_payload(slurp(given.at(2)))) << "\n";
     }}},
    {"replay", {6, replays}},
    {"optimiser", {5, optimise}},
    {"schedule", {2, schedules}},
    {"walk", {2, walks}},
    {"settings", {2, settings}},
};

}  // namespace

std::string slurp(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw Error("cannot read " + path);
  return {std::istreambuf_iterator<char>(stream), {}};
}

void spill(const std::string& path, const std::string& bytes) {
  std::ofstream stream(path, std::ios::binary | std::ios::trunc);
  if (!(stream << bytes).flush()) throw Error("cannot write " + path);
}

}  // namespace corolla

int main(int count, char** arguments) {
  using namespace corolla;
  const Arguments given(arguments + 1, arguments + count);
  Commands commands = kCommands;
#if !defined(COROLLA_BARE)
  for (const Commands& more : {task_commands(), reading_commands()})
    commands.insert(more.begin(), more.end());
#endif
  const auto found = given.empty() ? commands.end() : commands.find(given[0]);
  if (found == commands.end() || given.size() < found->second.arguments) {
    std::cerr << "usage: corolla-native-check COMMAND ...; see the head of testbench.cc\n";
    return 2;
  }
  try {
    found->second.run(given);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
