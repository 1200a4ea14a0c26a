// What steps cost, and what the losses were.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace corolla {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

uint64_t peak_rss();  // bytes of this process so far

double quantile(std::vector<double> values, double part);  // 0 of nothing

class Meter {
 public:
  // `before`: seconds of work that a checkpoint tells of.
  explicit Meter(double before = 0) : before_(before) {}

  void step(double seconds) { steps_.push_back(seconds); }
  void perturb(double seconds) { perturb_ += seconds; }
  double seconds() const { return before_ + total_.seconds(); }
  // Names of a reply: device_step_ms_p50 and so on. `losses` are those of the steps in order.
  void report(std::map<std::string, double>& metrics, const std::vector<double>& losses) const;

 private:
  double before_, perturb_ = 0;
  std::vector<double> steps_;
  Stopwatch total_;
};

}  // namespace corolla
