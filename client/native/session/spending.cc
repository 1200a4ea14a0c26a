#include "session/spending.h"

#include <algorithm>
#include <limits>

#include "session/policy.h"

namespace corolla {

Spending::Spending(std::function<uint64_t()> bytes) : bytes_(std::move(bytes)) {}

void Spending::limit(const v1::Policy& policy, Spent today) {
  policy_ = policy;
  today_ = today;
}

void Spending::works(std::function<double()> worked) { worked_ = std::move(worked); }

Spent Spending::spent() const {
  Spent since;
  since.bytes = static_cast<double>(bytes_() - settled_);
  since.seconds = seconds_ + (worked_ ? worked_() : 0);
  return since;
}

Spent Spending::total() const {
  Spent all = spent();
  all.bytes += today_.bytes;
  all.seconds += today_.seconds;
  all.battery += today_.battery;
  return all;
}

void Spending::settle() {
  settled_ = bytes_();
  seconds_ = 0;
  worked_ = nullptr;
}

double Spending::ask(uint64_t coming) const {
  Spent all = total();
  Lacks lacks = used_up(policy_, all);
  double most = static_cast<double>(policy_.daily_bytes());
  if (lacks.empty() && most > 0 && all.bytes + static_cast<double>(coming) > most)
    lacks.push_back("daily-bytes");
  if (!lacks.empty()) throw UsedUp(in_words(lacks));
  if (!(policy_.daily_seconds() > 0)) return std::numeric_limits<double>::infinity();
  return std::max(kLeastSeconds, policy_.daily_seconds() - all.seconds);
}

}  // namespace corolla
