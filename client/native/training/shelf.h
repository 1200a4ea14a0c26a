// What a device keeps of one run on its disk: groups of tensors by content, and where its log led.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "base/tensors.h"

namespace corolla {

using Groups = std::map<std::string, std::string>;  // group -> content id

class Shelf {
 public:
  // Throws Error for a run that is no id.
  Shelf(const std::filesystem::path& state, const std::string& run);

  // Nothing when it is not held, or is damaged. Throws Error for an id that is none.
  std::optional<Params> group(const std::string& content) const;
  // Throws Error for a group that is not what was announced.
  void keep(const std::string& name, const Params& params, const std::string& content) const;
  // The file of the weights that the log led to.
  std::filesystem::path log() const { return folder_ / "log.safetensors"; }
  // A phone takes part in one run at a time: what others and other rounds left behind goes.
  void prune(const Groups& wanted) const;

 private:
  std::filesystem::path file(const std::string& content) const;

  std::filesystem::path runs_, folder_;
};

}  // namespace corolla
