#include "training/shelf.h"

#include <algorithm>

#include "base/files.h"
#include "base/hash.h"
#include "base/safetensors.h"

namespace corolla {

Shelf::Shelf(const std::filesystem::path& state, const std::string& run)
    : runs_(state / "runs"), folder_(runs_ / run) {
  if (!is_hex(run, 32)) throw Error("the task has a run that is no id");
}

std::filesystem::path Shelf::file(const std::string& content) const {
  if (!is_hex(content, 32)) throw Error("a cached group has an id that is none");
  return folder_ / (content + ".safetensors");
}

std::optional<Params> Shelf::group(const std::string& content) const {
  const std::filesystem::path path = file(content);
  std::error_code failed;
  if (!std::filesystem::exists(path, failed)) return {};
  try {
    Stored found = load_tensors(path);
    if (content_id(found.tensors) == content) return std::move(found.tensors);
  } catch (const Error&) {  // damaged: it is sent again
  }
  return {};
}

void Shelf::keep(const std::string& name, const Params& params, const std::string& content) const {
  if (content_id(params) != content)
    throw Error("cached group " + name + " does not match its content id");
  make_folder(folder_);
  write_file(file(content), encode(params, {}));
}

void Shelf::prune(const Groups& wanted) const {
  std::error_code failed;
  for (const auto& entry : std::filesystem::directory_iterator(runs_, failed))
    if (entry.path() != folder_) std::filesystem::remove_all(entry.path(), failed);
  for (const auto& entry : std::filesystem::directory_iterator(folder_, failed)) {
    const std::string name = entry.path().stem().string();
    const bool named = std::any_of(wanted.begin(), wanted.end(),
                                   [&](const auto& group) { return group.second == name; });
    if (is_hex(name, 32) && !named) std::filesystem::remove(entry.path(), failed);
  }
}

}  // namespace corolla
