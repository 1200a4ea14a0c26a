#include "base/stop.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>

namespace corolla {

Moment in_seconds(double seconds) {
  constexpr double kYear = 365.0 * 86400;
  double sound = seconds > 0 ? std::min(seconds, kYear) : 0;  // 0: also what is no number
  auto span = std::chrono::duration<double>(sound);
  return now() + std::chrono::duration_cast<Moment::duration>(span);
}

Stop::Stop() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) throw Error("cannot make a pipe");
  reader_ = ends[0];
  writer_ = ends[1];
}

Stop::~Stop() {
  ::close(reader_);
  ::close(writer_);
}

void Stop::set() noexcept {
  set_ = true;
  char byte = 0;  // never read: everybody who waits sees it
  [[maybe_unused]] ssize_t written = ::write(writer_, &byte, 1);
}

void Stop::check() const {
  if (set_) throw Stopped();
}

void Stop::wait(double seconds) const {
  Moment until = in_seconds(seconds);
  while (true) {
    check();
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - now()).count();
    if (left <= 0) return;
    pollfd end{reader_, POLLIN, 0};
    ::poll(&end, 1, static_cast<int>(std::min<int64_t>(left + 1, 3600 * 1000)));
  }
}

}  // namespace corolla
