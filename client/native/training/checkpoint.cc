#include "training/checkpoint.h"

#include "base/files.h"

namespace corolla {
namespace {

constexpr auto kEvery = std::chrono::seconds(30);

}  // namespace

Checkpoint::Checkpoint(std::filesystem::path file, std::string key)
    : file_(std::move(file)), key_(std::move(key)), last_(std::chrono::steady_clock::now()) {}

std::optional<Stored> Checkpoint::load() {
  std::error_code failed;
  if (!std::filesystem::exists(file_, failed)) return {};
  try {
    Stored found = load_tensors(file_);
    if (found.facts["key"] == key_) return found;
  } catch (const Error&) {  // of a disk that was full, or of another version
  }
  clear();
  return {};
}

void Checkpoint::save(const Params& tensors, Facts facts) {
  facts["key"] = key_;
  write_file(file_, encode(tensors, facts));
  last_ = std::chrono::steady_clock::now();
}

bool Checkpoint::due() const { return std::chrono::steady_clock::now() - last_ > kEvery; }

void Checkpoint::clear() {
  std::error_code failed;
  std::filesystem::remove(file_, failed);
}

}  // namespace corolla
