#include "base/seeds.h"

#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/hash.h"

namespace corolla {

uint32_t derive(uint64_t seed, const Purpose& purpose) {
  nlohmann::json text = nlohmann::json::array({seed});
  for (const auto& part : purpose) std::visit([&](const auto& own) { text.push_back(own); }, part);
  std::string digest;
  try {
    digest = blake2b(text.dump(-1, ' ', true), 4);  // pure ASCII, as Python's json
  } catch (const nlohmann::json::exception&) {
    throw Error("a name is not UTF-8");
  }
  uint32_t made = 0;
  for (int i = 3; i >= 0; i--) made = made << 8 | static_cast<uint8_t>(digest[i]);
  return made;
}

std::vector<uint32_t> Shuffler::permutation(uint32_t size) {
  std::vector<uint32_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  for (uint32_t i = 0; i + 1 < size; i++)
    std::swap(order[i], order[i + static_cast<uint32_t>(bits_()) % (size - i)]);
  return order;
}

}  // namespace corolla
