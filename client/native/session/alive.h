// A lease that is kept while the device works, and whether the work is still worth it.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "session/channel.h"
#include "session/policy.h"
#include "training/conditions.h"

namespace corolla {

// Renews the lease three times in its time, in a thread of its own: a step may take long. All else
// belongs to the thread that trains.
class Alive : public Conditions {
 public:
  // `spending` counts what the device has spent today; it is asked before each heartbeat.
  Alive(Channel& channel, const v1::Lease& lease, v1::Policy policy, Platform& platform,
        const Stop& stop, Spending& spending, Moment deadline);
  ~Alive() override;

  std::string lapsed() override;
  // Calls `write` every few seconds of work: a process that is killed cannot tell what it spent.
  void keep_diary(std::function<void()> write);

  // Whether what has lapsed may hold again: neither the end of the round nor a limit of a day.
  bool can_come_back() const;
  // Waits, for as long as the lease lasts without news, until a task that has lapsed can go on;
  // false when that does not come. A rest. Throws Stopped.
  bool comes_back();

  // Why nothing can come of the task any more; "" while it can.
  std::string ended() const;

  // Begin and end of passes, whose time is measured.
  void works();
  void rests();

  uint32_t thermal_max() const { return thermal_max_; }
  double battery_spent() const;  // percent
  double pass_seconds() const;   // median time between two questions; 0: not known

 private:
  void beat() noexcept;
  void look(bool again);  // at the device, twice a second at most

  Channel& channel_;
  std::string id_;
  double lease_seconds_;
  v1::Policy policy_;
  Platform& platform_;
  const Stop& stop_;
  Spending& spending_;
  Moment deadline_;

  std::atomic<bool> unwanted_{false};
  std::mutex lock_;
  std::condition_variable changed_;
  bool over_ = false;  // under lock_

  Readings first_, now_;
  Lacks lacks_;
  std::function<void()> diary_;
  Moment next_look_, next_entry_, asked_;
  bool working_ = false, was_asked_ = false;
  uint32_t thermal_max_ = 0;
  std::vector<float> passes_;
  std::thread thread_;  // the last: it uses the others
};

}  // namespace corolla
