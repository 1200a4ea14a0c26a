#include "session/timings.h"

#include "base/files.h"

namespace corolla {

// The file is a message Native of which only the timings count.
Timings::Timings(std::filesystem::path file) : file_(std::move(file)) {
  v1::Native kept;
  auto data = read_file(file_);
  if (!data || !kept.ParseFromString(*data)) return;
  for (const auto& one : kept.timings()) known_[one.program() + " " + one.method()] = one;
}

void Timings::note(const v1::Assignment& assignment, double seconds) {
  v1::Timing one;
  one.set_program(assignment.program());
  one.set_method(assignment.method());
  one.set_length(assignment.length());
  one.set_seconds(seconds);
  known_[one.program() + " " + one.method()] = one;
  v1::Native all;
  tell(all);
  write_file(file_, all.SerializeAsString());
}

void Timings::tell(v1::Native& native) const {
  for (const auto& [name, one] : known_)
    if (native.timings_size() < kMostTimings) *native.add_timings() = one;
}

}  // namespace corolla
