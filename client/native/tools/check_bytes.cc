#include <malloc.h>

#include <fstream>
#include <iostream>

#include "base/json.h"
#include "base/meter.h"
#include "base/safetensors.h"
#include "session/messages.h"
#include "tools/testbench.h"
#include "training/bundle.h"
#include "training/scalars.h"
#include "training/settings.h"

namespace corolla {
namespace {

using nlohmann::json;
using Reader = std::function<void(const std::string&)>;

constexpr size_t kTogether = 64;  // cases between two looks at memory
constexpr size_t kShown = 5;

template <class M>
M parsed(const std::string& bytes) {
  M found;
  if (!found.ParseFromString(bytes)) throw WireError("message cannot be parsed");
  return found;
}

// What a gateway sends, and the functions that read it.
const std::map<std::string, Reader> kReaders = {
    {"answer", [](const std::string& bytes) {
       auto found = read_answer(bytes);
       check_id(found.lease().id());
       for (const auto& blob : found.lease().cached()) check_blob(blob, 1 << 20);
     }},
    {"task", [](const std::string& bytes) { read_task(bytes); }},
    {"files", [](const std::string& bytes) { read_files(bytes); }},
    {"chunk", [](const std::string& bytes) { check_chunk(parsed<v1::Chunk>(bytes), 0, 50); }},
    {"acknowledgement", [](const std::string& bytes) { parsed<v1::Acknowledgement>(bytes); }},
    {"scalars", [](const std::string& bytes) { load_scalars(parsed<v1::Scalars>(bytes), "it"); }},
    {"payload", [](const std::string& bytes) { decode_payload(bytes); }},
    {"manifest", [](const std::string& bytes) { parse_manifest(bytes); }},
    {"settings", [](const std::string& bytes) { read_settings(bytes, ""); }},
};

uint64_t resident() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line))
    if (!line.rfind("VmRSS:", 0)) return std::stoull(line.substr(6)) * 1024;
  return 0;
}

// One after the other: 4 bytes of its size (little-endian), then the case.
std::vector<std::string> next_cases(std::istream& stream) {
  std::vector<std::string> cases;
  unsigned char head[4];
  while (cases.size() < kTogether && stream.read(reinterpret_cast<char*>(head), 4)) {
    std::string one(head[0] | head[1] << 8 | head[2] << 16 | static_cast<size_t>(head[3]) << 24, 0);
    if (!stream.read(one.data(), static_cast<std::streamsize>(one.size())))
      throw Error("the file ends within a case");
    cases.push_back(std::move(one));
  }
  return cases;
}

// How many were read and refused, the last refusal, what else was thrown, and by how many bytes the
// process grew at most.
void read_cases(const Arguments& given) {
  const Reader& read = kReaders.at(given.at(1));
  std::ifstream stream(given.at(2), std::ios::binary);
  uint64_t good = 0, refused = 0, grown = 0;
  std::string why;
  json escaped = json::array();
  for (auto cases = next_cases(stream); !cases.empty(); cases = next_cases(stream)) {
    ::malloc_trim(0);
    const uint64_t idle = resident();
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak counts from here
    for (const std::string& one : cases) try {
        read(one);
        good++;
      } catch (const Error& error) {
        refused++;
        why = error.what();
        if (why.find('\n') != std::string::npos && escaped.size() < kShown)
          escaped.push_back("more than one line: " + why);
      } catch (const std::exception& error) {
        if (escaped.size() < kShown) escaped.push_back(error.what());
      }
    const uint64_t most = peak_rss();
    grown = std::max(grown, most > idle ? most - idle : 0);
  }
  json told{{"read", good}, {"refused", refused}, {"why", why},
            {"escaped", escaped}, {"grown", grown}};
  std::cout << told.dump(-1, ' ', true, json::error_handler_t::replace) << "\n";
}

}  // namespace

Commands reading_commands() { return {{"read", {3, read_cases}}}; }

}  // namespace corolla
