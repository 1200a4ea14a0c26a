#include "base/signs.h"

#include <cmath>

#include "base/error.h"
#include "base/half.h"

extern "C" {
void corolla_words(const uint64_t* counter, const uint64_t* key, int64_t blocks, uint64_t* out);
void corolla_add(void* out, const void* source, int64_t type, uint64_t start, uint64_t count,
                 int64_t steps, const uint64_t* table);
}

namespace corolla {
namespace {

constexpr size_t kWord = 64;  // signs of a word; the loops take so many values at a time

void run(void* out, const void* source, Type type, uint64_t offset, size_t count,
         const std::vector<uint64_t>& table) {
  if (!count) return;
  corolla_add(out, source, static_cast<int64_t>(type), offset, count,
              static_cast<int64_t>(table.size() / 5), table.data());
}

}  // namespace

std::vector<uint64_t> words(Key key, uint64_t start, size_t count, uint64_t stream) {
  const uint64_t first = start >> 2, blocks = ((start + count + 3) >> 2) - first;
  const uint64_t counter[4] = {first, stream, 0, 0}, both[2] = {key.seed, key.round};
  std::vector<uint64_t> made(4 * blocks);
  corolla_words(counter, both, static_cast<int64_t>(blocks), made.data());
  const auto begin = made.begin() + static_cast<ptrdiff_t>(start - 4 * first);
  return {begin, begin + static_cast<ptrdiff_t>(count)};
}

std::vector<uint64_t> philox(const uint64_t counter[4], Key key) {
  std::vector<uint64_t> made(4);
  const uint64_t both[2] = {key.seed, key.round};
  corolla_words(counter, both, 1, made.data());
  return made;
}

std::string signs(Key key, uint32_t k, uint64_t start, size_t count) {
  std::vector<float> values(count, 0.0f);
  add(values.data(), values.data(), Type::fp32, start, count, key, {{k, 1.0f}});
  std::string text;
  for (const float value : values) text += value > 0 ? '+' : '-';
  return text;
}

std::vector<uint32_t> choices(uint64_t seed, size_t count, uint32_t size) {
  std::vector<uint32_t> chosen;
  chosen.reserve(count);
  for (const uint64_t word : words({seed, 0}, 0, count, 1))
    chosen.push_back(static_cast<uint32_t>(word & (size - 1)));
  return chosen;
}

void fwht(std::vector<double>& v) {
  for (size_t h = 1; h < v.size(); h *= 2)
    for (size_t i = 0; i < v.size(); i += 2 * h)
      for (size_t j = i; j < i + h; j++) {
        const double x = v[j], y = v[j + h];
        v[j] = x + y;
        v[j + h] = x - y;
      }
}

bool is_pool(uint64_t size) { return size >= 1 && size <= kMaxPool && !(size & (size - 1)); }

Round prepared(Key key, std::vector<double> sums, double step) {
  if (!is_pool(sums.size()))
    throw Error("a row has " + std::to_string(sums.size()) + " sums, not a power of two");
  fwht(sums);
  Round made{key, {}};
  made.values.reserve(sums.size());
  for (const double sum : sums) {
    made.values.push_back(static_cast<float>(step * sum));
    if (!std::isfinite(made.values.back())) throw Error("a row of the log is not finite in fp32");
  }
  return made;
}

void add(void* out, const void* source, Type type, uint64_t offset, size_t count, Key key,
         const std::vector<Term>& terms) {
  std::vector<uint64_t> table;
  for (const Term& term : terms)
    table.insert(table.end(),
                 {key.seed, key.round, term.direction, 0, bits_of_float(term.scale)});
  run(out, source, type, offset, count, table);
}

void replay(void* out, const void* source, Type type, uint64_t offset, size_t count,
            const std::vector<Round>& rounds) {
  std::vector<std::vector<float>> padded(rounds.size());
  std::vector<uint64_t> table;
  for (size_t r = 0; r < rounds.size(); r++) {
    const std::vector<float>* values = &rounds[r].values;
    if (values->size() < kWord) {  // repeated: the loops take 64 at a time
      padded[r].resize(kWord);
      for (size_t i = 0; i < kWord; i++) padded[r][i] = (*values)[i % values->size()];
      values = &padded[r];
    }
    table.insert(table.end(),
                 {rounds[r].key.seed, rounds[r].key.round, 0, values->size() - 1,
                  static_cast<uint64_t>(reinterpret_cast<uintptr_t>(values->data()))});
  }
  run(out, source, type, offset, count, table);
}

}  // namespace corolla
