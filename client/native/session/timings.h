// How long one pass over one sequence takes on this device, as it was measured at work.
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "corolla/proto/device.pb.h"

namespace corolla {

constexpr int kMostTimings = 64;  // in a message

class Timings {
 public:
  explicit Timings(std::filesystem::path file);

  void note(const v1::Assignment& assignment, double seconds);  // throws DiskError
  void tell(v1::Native& native) const;

 private:
  std::filesystem::path file_;
  std::map<std::string, v1::Timing> known_;  // "program method" -> the last
};

}  // namespace corolla
