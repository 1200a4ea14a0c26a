// What is asked of this device, by its gateway and by its owner: judged here, told to nobody.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/platform.h"
#include "corolla/proto/device.pb.h"
#include "session/history.h"

namespace corolla {

// What does not hold, by its name in --policy of the gateway ("charging", "daily-bytes", ...).
using Lacks = std::vector<std::string>;

// Before a check-in.
Lacks before_check_in(const v1::Policy& policy, const Readings& now, uint64_t examples,
                      const Spent& today);

// While it trains.
Lacks while_training(const v1::Policy& policy, const Readings& now, const Spent& today);

// The limits of a day that are reached.
Lacks used_up(const v1::Policy& policy, const Spent& today);

// With a task of a round: whether it comes too soon after the last contribution to that run.
Lacks with_lease(const v1::Policy& policy, const std::vector<Contribution>& history,
                 const std::string& run, uint32_t round, double now);

// Both at once: of each limit the stricter one.
v1::Policy stricter(const v1::Policy& a, const v1::Policy& b);

// In words, as "not charging, the battery is low".
std::string in_words(const Lacks& lacks);

}  // namespace corolla
