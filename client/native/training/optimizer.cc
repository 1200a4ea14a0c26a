#include "training/optimizer.h"

#include <algorithm>
#include <cmath>

namespace corolla {

Sgd::Sgd(std::vector<Range> trained, double weight_decay)
    : trained_(std::move(trained)), decay_(weight_decay) {}

void Sgd::step(std::vector<float>& weights, const std::vector<float>& gradient, double rate) {
  steps++;
  const auto decay = static_cast<float>(decay_), step = static_cast<float>(rate);
  for (const Range& own : trained_)
    for (size_t i = own.begin; i < own.end; i++) {
      const float g = decay_ != 0 ? gradient[i] + decay * weights[i] : gradient[i];
      weights[i] -= step * g;
    }
}

AdamW::AdamW(size_t size, std::vector<Range> trained, double weight_decay)
    : trained_(std::move(trained)), mean_(size), square_(size), decay_(weight_decay) {}

void AdamW::step(std::vector<float>& weights, const std::vector<float>& gradient, double rate) {
  constexpr double kMean = 0.9, kSquare = 0.999;
  constexpr float kEpsilon = 1e-8f;
  steps++;
  const auto count = static_cast<double>(steps);
  const auto kept = static_cast<float>(1 - rate * decay_);
  const auto step = static_cast<float>(rate / (1 - std::pow(kMean, count)));
  const auto root = static_cast<float>(std::sqrt(1 - std::pow(kSquare, count)));
  const auto fresh = static_cast<float>(1 - kMean), fresh_square = static_cast<float>(1 - kSquare);
  const auto held_square = static_cast<float>(kSquare);
  for (const Range& own : trained_)
    for (size_t i = own.begin; i < own.end; i++) {
      const float g = gradient[i];
      mean_[i] += fresh * (g - mean_[i]);
      square_[i] = square_[i] * held_square + fresh_square * (g * g);
      const float scale = std::sqrt(square_[i]) / root + kEpsilon;
      weights[i] = weights[i] * kept - step * (mean_[i] / scale);
    }
}

void clip_norm(std::vector<float>& gradient, const std::vector<Range>& trained, double most) {
  double squares = 0;
  for (const Range& own : trained)
    for (size_t i = own.begin; i < own.end; i++)
      squares += static_cast<double>(gradient[i]) * gradient[i];
  const auto factor = static_cast<float>(std::min(1.0, most / (std::sqrt(squares) + 1e-6)));
  for (const Range& own : trained)
    for (size_t i = own.begin; i < own.end; i++) gradient[i] *= factor;
}

}  // namespace corolla
