// One method of one program of a bundle, loaded. The runtime behind it is ExecuTorch.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "training/bundle.h"
#include "training/data.h"

namespace corolla {

// A sequence as it is trained on: at most so many tokens of it.
struct View {
  const Sequence* sequence = nullptr;
  size_t length = 0;
  int64_t targets = 0;  // within that length
};

class Engine {
 public:
  // Maps the files into memory; what is read of them stays the system's to drop. `threads` of the
  // CPU at most. Throws Error when the program cannot be loaded.
  Engine(const Manifest& manifest, const std::filesystem::path& bundle, const std::string& program,
         const std::string& method, int threads);
  ~Engine();

  // The sum over the targets of -log p, with the adapter `shown` (its B times the scaling). Throws
  // Error when the program fails. NaN is an answer.
  double loss(const View& view, const std::vector<float>& shown);
  // The same, of a "grad" method; adds the gradient of that sum.
  double gradient(const View& view, const std::vector<float>& shown, std::vector<float>& sum);

 private:
  struct Loaded;
  std::unique_ptr<Loaded> loaded_;
};

}  // namespace corolla
