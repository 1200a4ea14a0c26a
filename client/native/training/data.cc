#include "training/data.h"

#include <fstream>
#include <map>
#include <set>
#include <string>

#include "base/error.h"
#include "base/json.h"

namespace corolla {
namespace {

constexpr size_t kLongest = 1 << 17;       // tokens of a sequence
constexpr size_t kLongestLine = 8 << 20;   // characters

using nlohmann::json;

std::vector<int32_t> numbers(const json& row, const char* key, int64_t least, int64_t beyond) {
  const auto found = row.find(key);
  if (found == row.end() || !found->is_array()) throw Error(std::string("lacks ") + key);
  if (found->size() > kLongest) throw Error(std::string(key) + " is too long");
  std::vector<int32_t> values;
  values.reserve(found->size());
  for (const json& value : *found) {
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() && value.get<uint64_t>() > INT32_MAX);
    const int64_t number = fits ? value.get<int64_t>() : -1;
    if (!fits || number >= beyond || (number < 0 && number != least))
      throw Error(std::string(key) + " has what is no token of the model");
    values.push_back(static_cast<int32_t>(number));
  }
  return values;
}

Sequence sequence(const json& row, int64_t beyond) {
  if (!row.is_object()) throw Error("is no table");
  Sequence made;
  made.ids = numbers(row, "input_ids", 0, beyond);
  made.labels = row.contains("labels") ? numbers(row, "labels", kIgnore, beyond) : made.ids;
  if (made.labels.size() != made.ids.size()) throw Error("has not as many labels as tokens");
  return made;
}

}  // namespace

int64_t Sequence::targets() const {
  int64_t count = 0;
  for (size_t i = 1; i < labels.size(); i++) count += labels[i] != kIgnore;
  return count;
}

uint64_t Data::examples() const {
  std::set<uint32_t> seen;
  for (const Sequence& own : sequences) seen.insert(own.example);
  return seen.size();
}

Data read_tokens(const std::filesystem::path& file, int64_t vocabulary) {
  std::ifstream stream(file);
  if (!stream) throw Error("cannot read " + file.string());
  const int64_t beyond = vocabulary > 0 ? vocabulary : int64_t{INT32_MAX} + 1;
  Data data;
  std::map<std::string, uint32_t> known;  // examples as they are named in the file
  std::string line;
  for (size_t number = 1; std::getline(stream, line); number++) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      if (line.size() > kLongestLine) throw Error("is too long");
      const json row = parse_json(line, "it", kLongestLine);
      Sequence own = sequence(row, beyond);
      const std::string name =
          row.contains("example") && !row["example"].is_null()
              ? row["example"].dump() : "line " + std::to_string(number);
      own.example = known.emplace(name, static_cast<uint32_t>(known.size())).first->second;
      if (own.targets()) data.sequences.push_back(std::move(own));
    } catch (const std::exception& error) {
      throw Error(file.string() + " line " + std::to_string(number) + ": " + error.what());
    }
  }
  if (data.sequences.empty()) throw Error(file.string() + " has no sequence with a target");
  return data;
}

}  // namespace corolla
