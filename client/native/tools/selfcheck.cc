#include "tools/selfcheck.h"

#include <string>
#include <vector>

#include "base/error.h"
#include "base/hash.h"
#include "base/signs.h"

namespace corolla {
namespace {

// Of the replay below, as corolla/directions/signs.py computes it.
constexpr const char* kReplayed =
    "a30862c303d1326b72d39cc81a1ac614eeaad35226a3f68946ab50c618f4dff3";

std::string replayed() {
  std::vector<float> w;
  for (int i = 0; i < 1000; i++) w.push_back(static_cast<float>(i % 17 - 8) / 16);
  for (uint64_t number = 1; number <= 3; number++) {
    std::vector<double> sums;
    for (uint64_t k = 0; k < 64; k++)
      sums.push_back((static_cast<double>((7 * k + number) % 11) - 5) / 32);
    replay(w.data(), w.data(), Type::fp32, 0, w.size(), {prepared({12345, number}, sums, 0.125)});
  }
  add(w.data(), w.data(), Type::fp32, 0, w.size(), {12345, 4}, {{37, 0.001f}, {5, -0.25f}});
  return sha256({reinterpret_cast<const char*>(w.data()), 4 * w.size()});
}

void expect(bool equal, const char* what) {
  if (!equal)
    throw Error(std::string("the sign stream is wrong on this device: ") + what + " differ");
}

}  // namespace

void check_signs() {
  const uint64_t counter[4] = {0, 0, 0, 0};
  const std::vector<uint64_t> known = {0x16554d9eca36314c, 0xdb20fe9d672d0fdc, 0xd7e772cee186176b,
                                       0x7e68b68aec7ba23b};
  expect(philox(counter, {0, 0}) == known, "words of Philox");
  expect(words({1, 2}, 5, 3, 3) ==
             std::vector<uint64_t>{0x39a88273926b8f36, 0x41567896ec753ad6, 0xd642f2f40243945f},
         "words of a stream");
  expect(choices(99, 6, 512) == std::vector<uint32_t>{224, 261, 157, 173, 120, 346}, "choices");
  expect(replayed() == kReplayed, "weights after three rounds");
}

}  // namespace corolla
