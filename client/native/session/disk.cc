#include "session/disk.h"

#include <algorithm>

#include "base/files.h"

namespace corolla {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kBlock = 4096;

// Of whole blocks: a million small files fill a disk too.
uint64_t blocks(uint64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

uint64_t bytes_in(const fs::path& folder) {
  uint64_t sum = 0;
  std::error_code failed;
  for (fs::recursive_directory_iterator at(folder, failed), end; !failed && at != end;
       at.increment(failed)) {
    std::error_code gone;
    if (!at->is_regular_file(gone)) continue;
    uint64_t size = at->file_size(gone);
    if (!gone) sum += blocks(size);
  }
  return sum;
}

[[noreturn]] void refuse(const std::string& what, uint64_t bytes, uint64_t allowed,
                         const std::string& option) {
  throw DiskLimit(what + " would keep " + human_bytes(bytes) +
                  " on this device's disk, its owner allows " + human_bytes(allowed) + " (" +
                  option + ")");
}

}  // namespace

Disk::Disk(fs::path state, DiskLimits limits) : state_(std::move(state)), limits_(limits) {}

uint64_t Disk::of_runs() const {
  uint64_t sum = bytes_in(state_ / "runs");
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator(state_, failed)) {
    std::string name = entry.path().filename().string();
    std::error_code gone;
    bool counts = name == "reply" || name == "checkpoint.safetensors" ||
                  entry.path().extension() == ".part";
    uint64_t size = counts ? fs::file_size(entry.path(), gone) : 0;
    if (!gone) sum += blocks(size);
  }
  return sum;
}

uint64_t Disk::of_bundles() const { return bytes_in(state_ / "bundles"); }

void Disk::admit(const std::string& run, const Groups& named, uint64_t coming) const {
  Shelf(state_, run).prune(named);
  uint64_t own = of_runs() + coming, all = own + of_bundles();
  if (own > limits_.run) refuse("the run", own, limits_.run, "--run-disk");
  if (all > limits_.all) refuse("the run and the bundle", all, limits_.all, "--disk");
}

bool Disk::holds(const std::string& run, const std::string& content) const {
  std::error_code failed;
  return fs::exists(state_ / "runs" / run / (content + ".safetensors"), failed);
}

uint64_t Disk::room_for(uint64_t coming) const {
  uint64_t bundles = of_bundles();
  if (bundles + of_runs() + coming > limits_.all) {
    std::error_code failed;
    fs::remove_all(state_ / "runs", failed);
  }
  uint64_t used = bundles + of_runs();
  return limits_.all - std::min(limits_.all, used);
}

}  // namespace corolla
