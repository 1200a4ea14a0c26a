// What this device has done: kept on the device alone, for as long as a policy can ask.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace corolla {

// A contribution, or a piece of work that came to none.
struct Contribution {
  double at = 0;  // seconds since 1970
  std::string run;
  uint32_t round = 0;
  double seconds = 0;  // at work
  double bytes = 0;    // up and down
  double battery = 0;  // percent of charge
  bool accepted = false;
};

struct Spent {
  double bytes = 0, seconds = 0, battery = 0;
};

// In the 24 hours before `now`.
Spent spent_today(const std::vector<Contribution>& history, double now);

// Lines of JSON in a file: the last 1 MiB is kept, those older than 30 days are not read.
class History {
 public:
  explicit History(std::filesystem::path file);

  // Oldest first; lines that cannot be read are left out.
  std::vector<Contribution> read(double now) const;
  // On a full disk it counts all the same, and is written with the next one.
  void add(const Contribution& one);

 private:
  std::filesystem::path file_;
  std::vector<Contribution> unwritten_;
};

double unix_now();  // seconds since 1970

}  // namespace corolla
