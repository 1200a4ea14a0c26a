#include "session/alive.h"

#include <algorithm>

namespace corolla {
namespace {

constexpr double kEvery = 0.5;  // seconds between two looks at the device
constexpr double kEntry = 2;    // seconds between two entries of the diary
constexpr size_t kMostPasses = 1000;
constexpr double kShortest = 0.3, kLongest = 86400;  // seconds of a lease

double since(Moment begin) { return std::chrono::duration<double>(now() - begin).count(); }

// Whatever a gateway says, also what is no number.
double sound(double seconds) {
  return seconds > kShortest ? std::min(seconds, kLongest) : kShortest;
}

// A limit of a day does not come back within a lease.
bool for_today(const std::string& name) { return name.rfind("daily-", 0) == 0; }

std::string any_more(const Lacks& lacks) {
  std::string first = in_words({lacks.front()});
  return first + (first.rfind("not ", 0) == 0 ? " any more" : "");
}

}  // namespace

Alive::Alive(Channel& channel, const v1::Lease& lease, v1::Policy policy, Platform& platform,
             const Stop& stop, Spending& spending, Moment deadline)
    : channel_(channel),
      id_(lease.id()),
      lease_seconds_(sound(lease.seconds())),
      policy_(std::move(policy)),
      platform_(platform),
      stop_(stop),
      spending_(spending),
      deadline_(deadline),
      first_(platform.read()),
      now_(first_),
      thread_([this] { beat(); }) {}

Alive::~Alive() {
  {
    std::lock_guard hold(lock_);
    over_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Alive::beat() noexcept {
  double pause = lease_seconds_ / 3;
  v1::HeartbeatRequest request;
  request.set_lease(id_);
  std::unique_lock hold(lock_);
  while (!changed_.wait_for(hold, std::chrono::duration<double>(pause), [this] { return over_; })) {
    hold.unlock();
    v1::HeartbeatResponse response;
    try {
      double left = spending_.ask(request.ByteSizeLong() + kOverhead);
      double patience = std::min(pause, left);
      auto status = channel_.once(&Channel::Stub::Heartbeat, request, &response, patience);
      if (status.ok() && !response.wanted()) unwanted_ = true;  // else the lease outlives two more
    } catch (const std::exception&) {  // the day is used up, or no memory for it, this time
    }
    hold.lock();
    if (unwanted_) return;
  }
}

std::string Alive::ended() const {
  if (stop_.is_set()) return "the device was stopped";
  if (unwanted_) return "not wanted any more";
  if (now() >= deadline_) return "the round is over";
  return "";
}

void Alive::look(bool again) {
  if (!again && now() < next_look_) return;
  next_look_ = in_seconds(kEvery);
  now_ = platform_.read();
  thermal_max_ = std::max(thermal_max_, now_.thermal);
  Spent today = spending_.total();
  today.battery += battery_spent();
  lacks_ = while_training(policy_, now_, today);
}

std::string Alive::lapsed() {
  if (working_ && was_asked_ && passes_.size() < kMostPasses)
    passes_.push_back(static_cast<float>(since(asked_)));
  look(false);
  if (diary_ && now() >= next_entry_) {
    diary_();
    next_entry_ = in_seconds(kEntry);
  }
  asked_ = now();
  was_asked_ = true;
  if (auto why = ended(); !why.empty()) return why;
  return lacks_.empty() ? "" : any_more(lacks_);
}

void Alive::keep_diary(std::function<void()> write) {
  diary_ = std::move(write);
  next_entry_ = in_seconds(kEntry);
}

bool Alive::can_come_back() const {
  return ended().empty() && std::none_of(lacks_.begin(), lacks_.end(), for_today);
}

bool Alive::comes_back() {
  Resting wait(spending_);
  Moment until = in_seconds(lease_seconds_);
  while (true) {
    stop_.check();
    look(true);
    if (!can_come_back() || now() >= until) return false;
    if (lacks_.empty()) return true;
    stop_.wait(kEvery);
  }
}

void Alive::works() {
  working_ = true;
  was_asked_ = false;
}

void Alive::rests() { working_ = false; }

double Alive::battery_spent() const {
  double spent = static_cast<double>(first_.battery_percent) - now_.battery_percent;
  return std::max(0.0, spent);
}

double Alive::pass_seconds() const {
  if (passes_.empty()) return 0;
  auto sorted = passes_;
  auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  return *middle;
}

}  // namespace corolla
