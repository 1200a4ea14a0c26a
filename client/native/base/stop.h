// How everything that waits or works is told to end.
#pragma once

#include <atomic>
#include <chrono>

#include "base/error.h"

namespace corolla {

using Moment = std::chrono::steady_clock::time_point;
constexpr Moment kForever = Moment::max();

inline Moment now() { return std::chrono::steady_clock::now(); }

// `seconds` from now; far away for what does not fit.
Moment in_seconds(double seconds);

// Nobody's mistake: the process was told to end.
class Stopped : public Error {
 public:
  Stopped() : Error("stopped") {}
};

// What only the owner of the device can mend: a wrong option, a wrong file.
class UsageError : public Error {
 public:
  using Error::Error;
};

// Set once, by a signal or by another thread; whoever waits wakes up.
class Stop {
 public:
  Stop();
  ~Stop();
  Stop(const Stop&) = delete;
  Stop& operator=(const Stop&) = delete;

  void set() noexcept;  // also from the handler of a signal
  bool is_set() const { return set_; }
  void check() const;  // throws Stopped
  // Throws Stopped when it is set meanwhile.
  void wait(double seconds) const;

 private:
  std::atomic<bool> set_{false};
  int reader_ = -1, writer_ = -1;
};

}  // namespace corolla
