#include "tools/measure.h"

#include <algorithm>
#include <thread>

#include "base/error.h"
#include "base/meter.h"
#include "base/signs.h"
#include "training/engine.h"
#include "training/layout.h"
#include "training/optimizer.h"

namespace corolla {
namespace {

constexpr Key kKey{1, 1};
constexpr float kEps = 1e-3f, kRate = 1e-3f;

// A start as after some training: B is not zero.
std::vector<float> adapter(const Layout& layout) {
  std::vector<float> weights(layout.size());
  add(weights.data(), weights.data(), Type::fp32, 0, weights.size(), {2, 2}, {{0, 0.01f}});
  return weights;
}

Sequence counting(const Manifest& manifest, int length) {
  Sequence made;
  for (int i = 0; i < length; i++)
    made.ids.push_back(static_cast<int32_t>(i % std::max<int64_t>(manifest.vocab, 1)));
  made.labels = made.ids;
  return made;
}

double backward(Engine& engine, const View& view, std::vector<float>& weights) {
  std::vector<float> gradient(weights.size());
  const double loss = engine.gradient(view, weights, gradient) / static_cast<double>(view.targets);
  for (float& value : gradient) value /= static_cast<float>(view.targets);
  Sgd({{0, weights.size()}}, 0).step(weights, gradient, kRate);
  return loss;
}

// The step of a zeroth-order client: two looks and a move.
double forward(Engine& engine, const View& view, const Layout& layout, uint32_t k,
               std::vector<float>& weights, std::vector<float>& shown, Meter& meter) {
  double losses[2];
  for (int side = 0; side < 2; side++) {
    const Stopwatch watch;
    add(shown.data(), weights.data(), Type::fp32, 0, weights.size(), kKey,
        {{k, side ? -kEps : kEps}});
    layout.scale_b(shown, 2.0f);
    meter.perturb(watch.seconds());
    losses[side] = engine.loss(view, shown) / static_cast<double>(view.targets);
  }
  const Stopwatch watch;
  const auto slope = static_cast<float>((losses[0] - losses[1]) / (2 * kEps));
  add(weights.data(), weights.data(), Type::fp32, 0, weights.size(), kKey, {{k, -1e-5f * slope}});
  meter.perturb(watch.seconds());
  return losses[0];
}

View view_of(const Sequence& own, int length) {
  View view{&own, std::min(own.ids.size(), static_cast<size_t>(length)), 0};
  for (size_t i = 1; i < view.length; i++) view.targets += own.labels[i] != kIgnore;
  return view;
}

}  // namespace

Measured measure(const Manifest& manifest, const std::filesystem::path& bundle,
                 const std::string& program, const std::string& method, int length, int steps,
                 int threads, const Data* data) {
  if (length < 2 || length > manifest.length)
    throw Error("length is from 2 to " + std::to_string(manifest.length) + ", found " +
                std::to_string(length));
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  Engine engine(manifest, bundle, program, method, threads > 0 ? threads : std::clamp(cores, 1, 2));
  const Layout layout(manifest.adapter);
  std::vector<float> weights = adapter(layout), shown(weights.size());
  const Sequence own = counting(manifest, length);
  Meter meter;
  std::vector<double> losses, times;
  for (int step = 0; step < steps; step++) {
    const Sequence& sequence =
        data ? data->sequences[static_cast<size_t>(step) % data->sequences.size()] : own;
    const View view = view_of(sequence, length);
    if (!view.targets) continue;
    const Stopwatch watch;
    losses.push_back(method == "grad" ? backward(engine, view, weights)
                                      : forward(engine, view, layout, static_cast<uint32_t>(step),
                                                weights, shown, meter));
    times.push_back(watch.seconds());
    meter.step(times.back());
  }
  if (losses.empty()) throw Error("no sequence has a target within that length");
  std::map<std::string, double> told;
  meter.report(told, losses);
  return {told["device_step_ms_p50"], told["device_step_ms_p95"],
          1e3 * *std::min_element(times.begin(), times.end()), told["device_perturb_share"],
          losses.front(), losses.back(), peak_rss()};
}

}  // namespace corolla
