// What a gateway and its runs may take of this device's disk: its owner says how much, asked before
// the first byte of a download is written.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "base/error.h"
#include "training/shelf.h"

namespace corolla {

struct DiskLimits {
  uint64_t run = 2000000000;  // bytes that one run may keep
  uint64_t all = 8000000000;  // bytes of all runs and the gateway's files together
};

// More would be kept than the owner allows.
class DiskLimit : public Error {
 public:
  using Error::Error;
};

class Disk {
 public:
  // `state` is the folder of the device.
  Disk(std::filesystem::path state, DiskLimits limits);

  // Deletes what other runs keep, and the groups of this run that a task does not name, before it
  // counts what the run keeps with `coming` bytes more. Throws DiskLimit, Error for a run that is
  // no id.
  void admit(const std::string& run, const Groups& named, uint64_t coming) const;
  bool holds(const std::string& run, const std::string& content) const;

  // Deletes what all runs keep where a bundle of `coming` bytes more would not fit otherwise; bytes
  // of the gateway's files that may still be written.
  uint64_t room_for(uint64_t coming) const;

 private:
  uint64_t of_runs() const;  // with what is downloaded for one, or waits to be delivered
  uint64_t of_bundles() const;

  std::filesystem::path state_;
  DiskLimits limits_;
};

}  // namespace corolla
