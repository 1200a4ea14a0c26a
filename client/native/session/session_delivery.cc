// What becomes of a session's work: it is kept, delivered, counted.
#include "base/files.h"
#include "base/hash.h"
#include "session/messages.h"
#include "session/session.h"

namespace corolla {
namespace {

constexpr uint64_t kSmallest = 1 << 16;  // bytes of a chunk on the slowest line
constexpr int kMostStuck = 10;
constexpr double kLook = 0.5;            // seconds between two looks at the network
constexpr std::chrono::seconds kLastMinute{60};  // for a report after the deadline

}  // namespace

// What cannot be kept, as on a full disk, does not stop the work: the reply is still in memory.
void Session::keep(const Begun& begun, const std::string& payload) {
  try {
    if (begun.done) kept_.finish(begun, payload);
    else kept_.begin(begun);
  } catch (const DiskError& error) {
    tell(std::string("this device fails: ") + error.what());
  }
}

// Work counts against the limits of its day, whatever comes of it.
void Session::note(Contribution work) {
  work.at = unix_now();
  if (work.seconds > 0 || work.bytes > 0) history_.add(work);
}

// The session of this lease that a process left which was killed.
void Session::note_left(const std::string& lease) {
  auto left = kept_.begun();
  if (!left || left->lease != lease) return;
  note(left->work);
  left->work.seconds = left->work.bytes = left->work.battery = 0;
  keep(*left, "");
}

// A session that ends without its reply being delivered, and may be gone on with.
void Session::interrupted(Begun begun) {
  auto left = kept_.begun();
  if (left && left->done) return;  // it is counted when it is delivered
  note(begun.work);
  begun.work.seconds = begun.work.bytes = begun.work.battery = 0;
  if (left) keep(begun, "");
}

// Heartbeats go on meanwhile. Throws Over when the result is not wanted any more.
void Session::wait_unmetered(const v1::Policy& policy, const Alive& alive) {
  while (policy.unmetered() && platform_.read().metered) {
    tell("waiting: not on an unmetered network");
    stop_.wait(kLook);
    if (auto why = alive.ended(); !why.empty()) throw Over(why);
  }
}

// Uploads and reports, until there is an answer or the round is long over.
v1::Acknowledgement Session::deliver(const Begun& begun, const std::string& payload,
                                     Moment deadline) {
  uint64_t size = payload.size(), at = 0, most = kChunk, sent = 0;
  int stuck = 0;
  while (at < size) {
    if (now() > deadline) throw Over("the round is over");
    auto chunk = make_chunk(payload.substr(at, most), at, size, begun.lease);
    sent += chunk.content().size();
    v1::UploadStatus status;
    try {
      status = caller_.call(&Channel::Stub::Upload, chunk, deadline, most > kSmallest);
    } catch (const Slow&) {
      most /= 2;
      continue;
    }
    if (!status.problem().empty()) throw Over(one_line(status.problem()));
    if (status.received() <= at) ++stuck;
    if (status.received() > size || stuck > kMostStuck || sent > 3 * size + 8 * kChunk)
      throw Over("the gateway does not take the update in");
    at = status.received();
  }
  v1::ReportRequest request;
  request.set_lease(begun.lease);
  request.set_reply(begun.header.SerializeAsString());
  Moment last = deadline == kForever ? kForever : deadline + kLastMinute;
  return caller_.call(&Channel::Stub::Report, request, last);
}

// The gateway's last word on a reply.
v1::RetryWindow Session::end(const Begun& begun, const v1::Acknowledgement& answer) {
  Contribution work = begun.work;
  work.at = unix_now();
  work.accepted = answer.accepted() && begun.header.error().empty();
  history_.add(work);
  kept_.clear();
  if (work.accepted) ++done_;
  if (work.accepted && is_hex(begun.log, 32)) write_file(owner_.state / "version", begun.log);
  if (!answer.accepted() && begun.header.missing_size()) {  // this device has forgotten something
    std::error_code absent;
    std::filesystem::remove(owner_.state / "version", absent);
  }
  tell("round " + std::to_string(work.round) + " as " + one_line(begun.header.client()) + ": " +
       (answer.accepted() ? "accepted" : "not accepted: " + one_line(answer.why())));
  return answer.retry();
}

void Session::drop(const Begun& begun, const std::string& why) {
  note(begun.work);
  kept_.clear();
  tell("dropped: " + why);
}

// Of a process that died since. Without a connection it waits on: nothing else can be done either.
bool Session::deliver_kept() {
  auto begun = kept_.begun();
  bool metered = policy().unmetered() && platform_.read().metered;
  if (!begun || !begun->done || metered) return false;
  try {
    retry_ = end(*begun, deliver(*begun, kept_.payload(), kForever));
  } catch (const Over& over) {
    drop(*begun, over.what());
  }
  return true;
}

// A session that was begun by a process that died, and that is not the one to go on with now.
void Session::report_left(const std::string& lease) {
  auto begun = kept_.begun();
  if (!begun || begun->lease == lease) return;
  try {
    end(*begun, deliver(*begun, "", kForever));
  } catch (const Over& over) {
    drop(*begun, over.what());
  }
}

}  // namespace corolla
