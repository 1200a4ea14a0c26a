// The highest serial number of a bundle that this device has seen of each publisher.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace corolla {

class Serials {
 public:
  // A file of JSON, {"<sha256 of a publisher's public key>": number}.
  explicit Serials(std::filesystem::path file) : file_(std::move(file)) {}

  // Takes note of a bundle that the publisher has signed. Throws Error for one that is older than
  // one before, and for a file that cannot be read; DiskError.
  void check(const std::string& publisher, uint64_t serial) const;

 private:
  std::filesystem::path file_;
};

}  // namespace corolla
