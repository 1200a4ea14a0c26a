#include "session/spending.h"

#include <algorithm>
#include <limits>

#include "session/policy.h"

namespace corolla {

Spending::Spending(std::function<uint64_t()> bytes) : bytes_(std::move(bytes)) {}

void Spending::limit(const v1::Policy& policy, Spent today) {
  std::lock_guard hold(lock_);
  policy_ = policy;
  today_ = today;
}

void Spending::works() {
  std::lock_guard hold(lock_);
  if (!began_) began_ = now();
}

void Spending::rests() {
  std::lock_guard hold(lock_);
  seconds_ = since().seconds;
  began_.reset();
}

Spent Spending::since() const {
  Spent found;
  found.bytes = static_cast<double>(bytes_() - settled_);
  found.seconds = seconds_;
  if (began_) found.seconds += std::chrono::duration<double>(now() - *began_).count();
  return found;
}

Spent Spending::all() const {
  Spent found = since();
  found.bytes += today_.bytes;
  found.seconds += today_.seconds;
  found.battery += today_.battery;
  return found;
}

Spent Spending::spent() const {
  std::lock_guard hold(lock_);
  return since();
}

Spent Spending::total() const {
  std::lock_guard hold(lock_);
  return all();
}

void Spending::settle() {
  std::lock_guard hold(lock_);
  settled_ = bytes_();
  seconds_ = 0;
  if (began_) began_ = now();
}

double Spending::ask(uint64_t coming) const {
  std::lock_guard hold(lock_);
  Spent today = all();
  Lacks lacks = used_up(policy_, today);
  double most = static_cast<double>(policy_.daily_bytes());
  if (lacks.empty() && most > 0 && today.bytes + static_cast<double>(coming) > most)
    lacks.push_back("daily-bytes");
  if (!lacks.empty()) throw UsedUp(in_words(lacks));
  if (!(policy_.daily_seconds() > 0)) return std::numeric_limits<double>::infinity();
  return std::max(kLeastSeconds, policy_.daily_seconds() - today.seconds);
}

}  // namespace corolla
