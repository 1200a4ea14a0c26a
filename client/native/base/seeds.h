// Seeds derived for one purpose each, and the shuffles that follow from them: as corolla/seeds.py
// and torch.randperm make them.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <variant>
#include <vector>

namespace corolla {

using Purpose = std::vector<std::variant<std::string, int64_t>>;

// A seed of 32 bits. Throws Error for a text that is not UTF-8.
uint32_t derive(uint64_t seed, const Purpose& purpose);

// The same stream of orders as torch.randperm with a CPU generator of that seed.
class Shuffler {
 public:
  explicit Shuffler(uint32_t seed) : bits_(seed) {}
  std::vector<uint32_t> permutation(uint32_t size);

 private:
  std::mt19937 bits_;  // torch's generator, of the same constants and seeding
};

}  // namespace corolla
