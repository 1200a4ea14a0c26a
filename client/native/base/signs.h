// The sign stream of proto/signs-v1.md: directions of +-1 over a flat vector, by compiled loops
// that Python has too (corolla/directions/signs.c).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace corolla {

constexpr uint32_t kMaxPool = 65536;

struct Key {
  uint64_t seed = 0, round = 0;
};

struct Term {
  uint32_t direction = 0;
  float scale = 0;
};

// Sums of one round, transformed: scale * fwht(a), rounded to fp32.
struct Round {
  Key key;
  std::vector<float> values;
};

enum class Type : int64_t { fp32 = 0, bf16 = 1, fp16 = 2 };

// Words start .. start + count - 1 of a stream.
std::vector<uint64_t> words(Key key, uint64_t start, size_t count, uint64_t stream);

// The four words of a counter.
std::vector<uint64_t> philox(const uint64_t counter[4], Key key);

// The signs of direction k at start .. start + count - 1, as '+' and '-'.
std::string signs(Key key, uint32_t k, uint64_t start, size_t count);

// The directions, below `size` = 2^p, that the client of a seed takes at its queries.
std::vector<uint32_t> choices(uint64_t seed, size_t count, uint32_t size);

// The Walsh-Hadamard transform in fp64, in place; the size is a power of two.
void fwht(std::vector<double>& values);

// What a round of sums adds, ready for replay: step * fwht(sums) in fp32. Throws Error when that is
// not finite, or there are not 2^p <= 65536 sums.
Round prepared(Key key, std::vector<double> sums, double step);

// out = source + all terms one after the other, for `count` values from `offset` of the flat
// vector.
void add(void* out, const void* source, Type type, uint64_t offset, size_t count, Key key,
         const std::vector<Term>& terms);

// out = source + all rounds one after the other: one pass for each 4096 values.
void replay(void* out, const void* source, Type type, uint64_t offset, size_t count,
            const std::vector<Round>& rounds);

bool is_pool(uint64_t size);  // a power of two of at most 65536

}  // namespace corolla
