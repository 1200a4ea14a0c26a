// The command line, checked as a whole before anything is done.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "corolla/proto/device.pb.h"
#include "session/channel.h"
#include "session/disk.h"

namespace corolla {

// The words after a command: those that begin with -- and what belongs to them, and the rest.
class Words {
 public:
  // `valued` take the next word, `flags` do not. Throws UsageError for others.
  Words(const std::vector<std::string>& words, const std::vector<std::string>& valued,
        const std::vector<std::string>& flags);

  bool has(const std::string& name) const { return values_.count(name); }
  const std::vector<std::string>& rest() const { return rest_; }

  // All of these throw UsageError naming the option.
  std::string text(const std::string& name) const;  // that has to be there
  std::string text(const std::string& name, const std::string& usual) const;
  uint64_t number(const std::string& name, uint64_t usual) const;
  double positive(const std::string& name, double usual) const;
  uint64_t bytes(const std::string& name, uint64_t usual) const;  // "200MB"
  std::vector<std::string> list(const std::string& name, const std::string& usual) const;

 private:
  std::map<std::string, std::string> values_;
  std::vector<std::string> rest_;
};

struct Options {
  std::string gateway, token, roots, name, platform;
  std::filesystem::path publisher, data, state;
  std::vector<std::string> methods;
  uint64_t memory = 0, rounds = 0;
  uint32_t length = 0;
  bool once = false;
  bool keep_updates = false;
  v1::Policy limits;
  DiskLimits disk;
  Pauses pauses;
};

// Makes the folder of the state, and the device's name where there is none yet. Throws UsageError.
Options read_options(const std::vector<std::string>& words);

extern const char kUsage[];

}  // namespace corolla
