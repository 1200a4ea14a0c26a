#include "session/policy.h"

#include <algorithm>
#include <map>

namespace corolla {
namespace {

void conditions(const v1::Policy& policy, const Readings& now, Lacks& lacks) {
  if (policy.charging() && !now.charging) lacks.push_back("charging");
  if (policy.unmetered() && now.metered) lacks.push_back("unmetered");
  if (policy.idle() && !now.idle) lacks.push_back("idle");
  if (!now.charging && now.battery_percent < policy.battery_percent()) lacks.push_back("battery");
  if (policy.thermal() && now.thermal > policy.thermal()) lacks.push_back("thermal");
}

bool reached(double limit, double spent) { return limit > 0 && spent >= limit; }

void add_to(Lacks& lacks, const Lacks& more) {
  lacks.insert(lacks.end(), more.begin(), more.end());
}

// 0 is no limit, and so is what a gateway may say in its place: less, or no number.
template <class T>
T least(T a, T b) {
  if (!(a > 0)) return b > 0 ? b : T{0};
  return b > 0 ? std::min(a, b) : a;
}

}  // namespace

Lacks before_check_in(const v1::Policy& policy, const Readings& now, uint64_t examples,
                      const Spent& today) {
  Lacks lacks;
  conditions(policy, now, lacks);
  if (now.storage_bytes < policy.storage_bytes()) lacks.push_back("storage");
  if (examples < policy.examples()) lacks.push_back("examples");
  add_to(lacks, used_up(policy, today));
  return lacks;
}

Lacks while_training(const v1::Policy& policy, const Readings& now, const Spent& today) {
  Lacks lacks;
  conditions(policy, now, lacks);
  add_to(lacks, used_up(policy, today));
  return lacks;
}

Lacks used_up(const v1::Policy& policy, const Spent& today) {
  Lacks lacks;
  double most_bytes = static_cast<double>(policy.daily_bytes());
  if (reached(most_bytes, today.bytes)) lacks.push_back("daily-bytes");
  if (reached(policy.daily_seconds(), today.seconds)) lacks.push_back("daily-seconds");
  if (reached(policy.daily_battery_percent(), today.battery)) lacks.push_back("daily-battery");
  return lacks;
}

Lacks with_lease(const v1::Policy& policy, const std::vector<Contribution>& history,
                 const std::string& run, uint32_t round, double now) {
  bool near = false, early = false;
  for (const auto& past : history) {
    if (!past.accepted || past.run != run) continue;
    near |= static_cast<int64_t>(round) - past.round < static_cast<int64_t>(policy.separation());
    early |= now - past.at < policy.period_seconds();
  }
  Lacks lacks;
  if (near && policy.separation()) lacks.push_back("separation");
  if (early && policy.period_seconds() > 0) lacks.push_back("period");
  return lacks;
}

v1::Policy stricter(const v1::Policy& a, const v1::Policy& b) {
  v1::Policy both;
  both.set_charging(a.charging() || b.charging());
  both.set_unmetered(a.unmetered() || b.unmetered());
  both.set_idle(a.idle() || b.idle());
  both.set_battery_percent(std::max(a.battery_percent(), b.battery_percent()));
  both.set_thermal(least(a.thermal(), b.thermal()));
  both.set_storage_bytes(std::max(a.storage_bytes(), b.storage_bytes()));
  both.set_examples(std::max(a.examples(), b.examples()));
  both.set_separation(std::max(a.separation(), b.separation()));
  both.set_period_seconds(std::max(a.period_seconds(), b.period_seconds()));
  both.set_daily_bytes(least(a.daily_bytes(), b.daily_bytes()));
  both.set_daily_seconds(least(a.daily_seconds(), b.daily_seconds()));
  both.set_daily_battery_percent(least(a.daily_battery_percent(), b.daily_battery_percent()));
  return both;
}

std::string in_words(const Lacks& lacks) {
  static const std::map<std::string, std::string> words = {
      {"charging", "not charging"},
      {"unmetered", "not on an unmetered network"},
      {"idle", "not idle"},
      {"battery", "the battery is low"},
      {"thermal", "too warm"},
      {"storage", "too little storage is free"},
      {"examples", "too few examples"},
      {"daily-bytes", "today's bytes are used up"},
      {"daily-seconds", "today's time is used up"},
      {"daily-battery", "today's charge is used up"},
      {"separation", "it contributed a few rounds ago"},
      {"period", "it contributed a short time ago"}};
  std::string text;
  for (const auto& name : lacks) text += (text.empty() ? "" : ", ") + words.at(name);
  return text;
}

}  // namespace corolla
