// What a device fetches from its gateway: blobs, and a bundle, chunk by chunk.
//
// A download that is cut goes on where it was, also in another process. Nothing is used before all
// its bytes have been checked; at no time is more than a chunk of a bundle in memory.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "corolla/proto/device.pb.h"
#include "session/disk.h"
#include "session/serials.h"
#include "training/bundle.h"

namespace corolla {

// The call of that name, and the bytes of its chunk; it tries again until it has an answer.
using Download = std::function<v1::Chunk(const v1::DownloadRequest&, uint64_t)>;

// The bytes of a blob, by way of a file in `folder`. Throws WireError when they are others.
std::string fetch(const v1::Blob& blob, const std::filesystem::path& folder,
                  const Download& download, uint64_t most);

// Of downloads in `folder` that nobody goes on with: all but those of these sha256.
void drop_parts(const std::filesystem::path& folder, const std::set<std::string>& wanted);

struct Bundle {
  std::string name;  // sha256 of the message Manifest that lists its files
  std::filesystem::path folder;
  Manifest manifest;
};

// The bundles in a folder, each in one of its own. One at a time is kept.
class Bundles {
 public:
  // In the folder of the device's state; `publisher`: the public key (PEM) whose signature counts.
  Bundles(const std::filesystem::path& state, std::filesystem::path publisher, const Disk& disk);

  // The last one that was fetched, if all of it is there: hashed once per process, and again after
  // a file was touched.
  const Bundle* current();

  // Fetches what is not there, and reuses what other bundles have of it. The signature is checked
  // before the large files are asked for; nothing stays of what is refused. Throws WireError and
  // Error for a bundle that is refused, also because the publisher has signed a newer one,
  // DiskError when `free` bytes are too few.
  const Bundle& fetch(const v1::Blob& manifest, const Download& download, uint64_t free);

 private:
  using Stamp = std::pair<uint64_t, std::filesystem::file_time_type>;

  void check_room(const std::string& name, uint64_t more, uint64_t free) const;
  void reuse(const std::filesystem::path& scratch, const v1::Manifest& files) const;
  std::optional<Bundle> open(const std::string& name) const;
  std::map<std::string, Stamp> stamps(const Bundle& bundle) const;
  void drop_others(const std::string& name) const;

  std::filesystem::path folder_, publisher_;
  const Disk& disk_;
  Serials serials_;
  std::optional<Bundle> current_;
  std::map<std::string, Stamp> stamps_;  // of the files of `current_` when they were checked
};

}  // namespace corolla
