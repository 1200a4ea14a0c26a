// Where each LoRA tensor lies in the one flat vector: sorted by name, row-major.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/tensors.h"
#include "training/bundle.h"
#include "training/optimizer.h"

namespace corolla {

struct Place {
  std::string name;
  std::vector<int64_t> shape;
  Range range;
  bool b = false;  // a factor B: (out, r)
};

class Layout {
 public:
  explicit Layout(const std::vector<AdapterTensor>& adapter);

  const std::vector<Place>& places() const { return places_; }
  size_t size() const { return size_; }

  // The tensors as one vector. Throws Error for one that is lacking, unknown, of another shape, or
  // has a value that is not usable.
  std::vector<float> flatten(const Params& params) const;
  // Those of `wanted`, out of a flat vector.
  Params unflatten(const std::vector<float>& flat,
                   const std::function<bool(const Place&)>& wanted) const;

  std::vector<Range> ranges(const std::function<bool(const Place&)>& wanted) const;
  // Multiplies the factors B, in place: programs compute with scaling 1.
  void scale_b(std::vector<float>& flat, float factor) const;

 private:
  std::vector<Place> places_;
  size_t size_ = 0;
};

inline bool all(const Place&) { return true; }
inline bool only_b(const Place& place) { return place.b; }

constexpr double kLargest = 1e12;  // of a received value, as corolla/wire/ranges.py has it

bool finite(const std::vector<float>& values);

// Whether a client takes this value from a server; NaN it does not.
inline bool usable(double x) { return std::fabs(x) <= kLargest; }

}  // namespace corolla
