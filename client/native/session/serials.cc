#include "session/serials.h"

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"

namespace corolla {

void Serials::check(const std::string& publisher, uint64_t serial) const {
  nlohmann::json known = nlohmann::json::object();
  std::error_code failed;
  if (std::filesystem::exists(file_, failed)) {
    known = parse_json(read_file(file_).value_or(""), "serials.json");
    if (!known.is_object())
      throw Error("serials.json is no table: delete it to trust the next bundle");
  }
  const auto found = known.find(publisher);
  const bool seen = found != known.end();
  if (seen && !found->is_number_unsigned())
    throw Error("serials.json has what is no serial number: delete it to trust the next bundle");
  const uint64_t highest = seen ? found->get<uint64_t>() : 0;
  if (serial < highest)
    throw Error("its serial number is " + std::to_string(serial) + ", this device has seen " +
                std::to_string(highest) + " of the same publisher: ask for the newer one");
  if (serial == highest) return;
  known[publisher] = serial;
  write_file(file_, known.dump());
}

}  // namespace corolla
