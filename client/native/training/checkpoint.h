// What a device has done so far of a task that was interrupted.
#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "base/safetensors.h"

namespace corolla {

class Checkpoint {
 public:
  // `key` names the task, the data and the program: what another key wrote is deleted.
  Checkpoint(std::filesystem::path file, std::string key);

  // What was written for this key, if anything can be read of it.
  std::optional<Stored> load();
  void save(const Params& tensors, Facts facts);
  // Whether the last one is so old that a loss would hurt.
  bool due() const;
  void clear();

 private:
  std::filesystem::path file_;
  std::string key_;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace corolla
