// What this device spends of the day that its owner and its gateway allow: one meter for all calls
// and all work, asked before each, so that no lease, download, heartbeat or visit is beside it.
#pragma once

#include <functional>
#include <mutex>
#include <optional>

#include "base/stop.h"
#include "corolla/proto/device.pb.h"
#include "session/history.h"
#include "session/over.h"

namespace corolla {

constexpr double kLeastSeconds = 1;  // that a call gets, however few are left of the day

// What may be spent in a day is spent.
class UsedUp : public Over {
 public:
  using Over::Over;
};

// Counts what was spent since the last entry of the history, beside what that holds of today. A
// visit is work from its beginning to its end, but for its waits. Thread-safe: heartbeats ask too.
class Spending {
 public:
  // `bytes`: those of all calls so far, up and down.
  explicit Spending(std::function<uint64_t()> bytes);

  // From now on `policy` holds, an owner's limits in it; `today` is what the history has.
  void limit(const v1::Policy& policy, Spent today);
  void works();  // from now on time counts
  void rests();  // from now on it does not
  Spent spent() const;  // since the last entry; no battery
  Spent total() const;  // today
  // An entry of the history has what was spent.
  void settle();

  // Seconds that a call may take that has about so many bytes. Throws UsedUp.
  double ask(uint64_t coming) const;

 private:
  Spent since() const;  // under lock_, as the next one
  Spent all() const;

  std::function<uint64_t()> bytes_;
  mutable std::mutex lock_;
  v1::Policy policy_;
  Spent today_;
  uint64_t settled_ = 0;
  double seconds_ = 0;
  std::optional<Moment> began_;  // of the work that is not yet in seconds_
};

// Work, while this lives.
class Working {
 public:
  explicit Working(Spending& spending) : spending_(spending) { spending_.works(); }
  ~Working() { spending_.rests(); }
  Working(const Working&) = delete;
  Working& operator=(const Working&) = delete;

 private:
  Spending& spending_;
};

// A wait within work, while this lives.
class Resting {
 public:
  explicit Resting(Spending& spending) : spending_(spending) { spending_.rests(); }
  ~Resting() { spending_.works(); }
  Resting(const Resting&) = delete;
  Resting& operator=(const Resting&) = delete;

 private:
  Spending& spending_;
};

}  // namespace corolla
