// The optimisers of torch over one flat vector: the same formulas in the same order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace corolla {

// Steps on the values that are selected; the others stay as they are to the bit.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  // `gradient` is that of `weights`; both have as many values as the optimiser was made for.
  virtual void step(std::vector<float>& weights, const std::vector<float>& gradient,
                    double rate) = 0;
  // What it remembers, for a checkpoint: of the size of the weights each, in an order of its own.
  virtual std::vector<std::vector<float>*> memory() { return {}; }
  // How many steps it has taken: to be set when its memory is.
  int64_t steps = 0;
};

// A part of the flat vector.
struct Range {
  size_t begin = 0, end = 0;
};

class Sgd : public Optimizer {  // without momentum
 public:
  Sgd(std::vector<Range> trained, double weight_decay);
  void step(std::vector<float>& weights, const std::vector<float>& gradient, double rate) override;

 private:
  std::vector<Range> trained_;
  double decay_;
};

// Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101; betas 0.9 and 0.999, epsilon 1e-8.
class AdamW : public Optimizer {
 public:
  AdamW(size_t size, std::vector<Range> trained, double weight_decay);
  void step(std::vector<float>& weights, const std::vector<float>& gradient, double rate) override;
  std::vector<std::vector<float>*> memory() override { return {&mean_, &square_}; }

 private:
  std::vector<Range> trained_;
  std::vector<float> mean_, square_;
  double decay_;
};

// As torch.nn.utils.clip_grad_norm_: gradients of a larger norm are made as large as `most`.
void clip_norm(std::vector<float>& gradient, const std::vector<Range>& trained, double most);

}  // namespace corolla
