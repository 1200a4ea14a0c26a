#include "training/layout.h"

#include <algorithm>
#include <cmath>

namespace corolla {

Layout::Layout(const std::vector<AdapterTensor>& adapter) {
  constexpr std::string_view kB = ".lora_B";
  for (const AdapterTensor& tensor : adapter) {
    const auto count = static_cast<size_t>(tensor.size());
    const bool b = tensor.name.size() > kB.size() &&
                   !tensor.name.compare(tensor.name.size() - kB.size(), kB.size(), kB);
    if (!places_.empty() && tensor.name <= places_.back().name)
      throw Error("the adapter of the bundle is not sorted by name");
    places_.push_back({tensor.name, tensor.shape, {size_, size_ + count}, b});
    size_ += count;
  }
}

std::vector<float> Layout::flatten(const Params& params) const {
  if (params.size() != places_.size())
    throw Error("the task's adapter has " + std::to_string(params.size()) +
                " tensors, the bundle's " + std::to_string(places_.size()));
  std::vector<float> flat(size_);
  for (const Place& place : places_) {
    const Tensor& tensor = find(params, place.name, "the task's adapter");
    if (tensor.dtype != Dtype::f32 || tensor.shape != place.shape)
      throw Error("tensor " + place.name + " of the task is not as in the bundle");
    std::memcpy(flat.data() + place.range.begin, tensor.bytes.data(), tensor.bytes.size());
  }
  if (!std::all_of(flat.begin(), flat.end(), usable))
    throw Error("the task's adapter has a value that is not finite, or larger than 1e12");
  return flat;
}

Params Layout::unflatten(const std::vector<float>& flat,
                         const std::function<bool(const Place&)>& wanted) const {
  Params params;
  for (const Place& place : places_) {
    if (!wanted(place)) continue;
    const size_t count = place.range.end - place.range.begin;
    params[place.name] = {
        Dtype::f32, place.shape,
        std::string(reinterpret_cast<const char*>(flat.data() + place.range.begin), 4 * count)};
  }
  return params;
}

std::vector<Range> Layout::ranges(const std::function<bool(const Place&)>& wanted) const {
  std::vector<Range> found;
  for (const Place& place : places_)
    if (wanted(place)) found.push_back(place.range);
  return found;
}

void Layout::scale_b(std::vector<float>& flat, float factor) const {
  if (factor == 1.0f) return;
  for (const Place& place : places_)
    if (place.b)
      for (size_t i = place.range.begin; i < place.range.end; i++) flat[i] *= factor;
}

bool finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

}  // namespace corolla
