// What this device spends of the day that its owner and its gateway allow: one meter for all calls,
// asked before each, so that no lease, download or visit is beside it.
#pragma once

#include <functional>

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

// Counts what was spent since the last entry of the history, beside what that holds of today. Of
// the thread that works; `bytes` may count calls of others.
class Spending {
 public:
  // `bytes`: those of all calls so far, up and down.
  explicit Spending(std::function<uint64_t()> bytes);

  // From now on `policy` holds, an owner's limits in it; `today` is what the history has.
  void limit(const v1::Policy& policy, Spent today);
  // A lease begins; `worked` tells its seconds at work until `settle`.
  void works(std::function<double()> worked);
  // A call took so long.
  void took(double seconds) { seconds_ += seconds; }
  Spent spent() const;  // since the last entry; no battery
  Spent total() const;  // today
  // An entry of the history has what was spent.
  void settle();

  // Seconds that a call may take that has about so many bytes. Throws UsedUp.
  double ask(uint64_t coming) const;

 private:
  std::function<uint64_t()> bytes_;
  std::function<double()> worked_;
  v1::Policy policy_;
  Spent today_;
  uint64_t settled_ = 0;
  double seconds_ = 0;
};

}  // namespace corolla
