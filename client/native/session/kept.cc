#include "session/kept.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/hash.h"
#include "session/messages.h"

namespace corolla {
namespace {

using nlohmann::json;

std::string bytes_of(const std::string& hexadecimal) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hexadecimal.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hexadecimal.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string text_of(const Begun& one) {
  json record = {{"lease", one.lease},
                 {"log", one.log},
                 {"header", hex(one.header.SerializeAsString())},
                 {"seconds", one.work.seconds},
                 {"bytes", one.work.bytes},
                 {"battery", one.work.battery},
                 {"done", one.done}};
  return record.dump();
}

}  // namespace

Kept::Kept(std::filesystem::path state, bool keep_updates)
    : record_(state / "session.json"), payload_(state / "reply") {
  if (keep_updates) updates_ = state / "updates";
}

std::optional<Begun> Kept::begun() const {
  auto text = read_file(record_, 4 << 20);
  if (!text) return std::nullopt;
  try {
    json record = json::parse(*text);
    Begun found;
    found.lease = record.at("lease");
    found.log = record.at("log");
    found.work.seconds = record.at("seconds");
    found.work.bytes = record.at("bytes");
    found.work.battery = record.at("battery");
    found.done = record.at("done");
    check_id(found.lease);
    if (!found.header.ParseFromString(bytes_of(record.at("header")))) return std::nullopt;
    found.work.run = found.header.run_id();
    found.work.round = found.header.round();
    bool whole = !found.done || sha256(payload()) == found.header.payload_sha256();
    return whole ? std::optional(found) : std::nullopt;
  } catch (const std::exception&) {  // damaged: as if it had never begun
    return std::nullopt;
  }
}

std::string Kept::payload() const { return read_file(payload_, kMaxPayload).value_or(""); }

void Kept::begin(const Begun& begun) const { write_file(record_, text_of(begun)); }

// The payload first: without the record it counts for nothing.
void Kept::finish(const Begun& begun, const std::string& payload) const {
  write_file(payload_, payload);
  write_file(record_, text_of(begun));
  if (updates_.empty()) return;
  char round[24];
  std::snprintf(round, sizeof round, "round-%03u", begun.header.round());
  make_folder(updates_);
  write_file(updates_ / (std::string(round) + ".header"), begun.header.SerializeAsString());
  write_file(updates_ / (std::string(round) + ".payload"), payload);
}

void Kept::clear() const {
  std::error_code absent;
  std::filesystem::remove(record_, absent);
  std::filesystem::remove(payload_, absent);
}

}  // namespace corolla
