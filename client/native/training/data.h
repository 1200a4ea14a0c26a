// The token file of a device: one sequence a line, made by `corolla tokens`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace corolla {

constexpr int64_t kIgnore = -100;  // the label of a position that does not count in the loss

struct Sequence {
  std::vector<int32_t> ids, labels;
  uint32_t example = 0;  // windows of one text share it, and count once

  // Predictions that count: the first token has no context.
  int64_t targets() const;
};

struct Data {
  std::vector<Sequence> sequences;

  uint64_t examples() const;  // distinct ones
};

// Lines {"input_ids": [...], "labels": [...], "example": n}; without labels all tokens count,
// without an example each line is one. Sequences without a target are left out. Throws Error naming
// the line for anything else; `vocabulary` (0: unknown) is the number of tokens a model knows.
Data read_tokens(const std::filesystem::path& file, int64_t vocabulary = 0);

}  // namespace corolla
