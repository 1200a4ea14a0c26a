#include "session/delivery.h"

#include <algorithm>
#include <chrono>
#include <system_error>

#include "base/files.h"
#include "base/hash.h"
#include "session/messages.h"

namespace corolla {
namespace {

constexpr uint64_t kSmallest = 1 << 16;  // bytes of a chunk on the slowest line
constexpr int kMostStuck = 10;
constexpr std::chrono::seconds kLastMinute{60};  // for a report after the deadline

}  // namespace

Delivery::Delivery(std::filesystem::path state, bool keep_updates, Caller& caller, History& history,
                   std::function<void(const std::string&)> tell)
    : version_(state / "version"),
      kept_(std::move(state), keep_updates),
      caller_(caller),
      history_(history),
      tell_(std::move(tell)) {}

void Delivery::keep(const Begun& begun, const std::string& payload) {
  try {
    if (begun.done) kept_.finish(begun, payload);
    else kept_.begin(begun);
  } catch (const DiskError& error) {
    tell_(std::string("this device fails: ") + error.what());
  }
}

// Work counts against the limits of its day, whatever comes of it.
void Delivery::note(Contribution work) {
  work.at = unix_now();
  if (work.seconds > 0 || work.bytes > 0) history_.add(work);
}

void Delivery::count_left(const std::string& lease) {
  auto left = kept_.begun();
  if (!left || left->lease != lease) return;
  note(left->work);
  left->work.seconds = left->work.bytes = left->work.battery = 0;
  keep(*left, "");
}

void Delivery::interrupted(Begun begun) {
  auto left = kept_.begun();
  if (left && left->done) return;  // it is counted when it is delivered
  note(begun.work);
  begun.work.seconds = begun.work.bytes = begun.work.battery = 0;
  if (left) keep(begun, "");
}

v1::Acknowledgement Delivery::deliver(const Begun& begun, const std::string& payload,
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
  return caller_.last_word(&Channel::Stub::Report, request, last);
}

v1::RetryWindow Delivery::end(const Begun& begun, const v1::Acknowledgement& answer) {
  Contribution work = begun.work;
  work.at = unix_now();
  work.accepted = answer.accepted() && begun.header.error().empty();
  history_.add(work);
  kept_.clear();
  if (work.accepted) ++accepted_;
  if (work.accepted && is_hex(begun.log, 32)) write_file(version_, begun.log);
  if (!answer.accepted() && begun.header.missing_size()) {  // this device has forgotten something
    std::error_code absent;
    std::filesystem::remove(version_, absent);
  }
  tell_("round " + std::to_string(work.round) + " as " + one_line(begun.header.client()) + ": " +
       (answer.accepted() ? "accepted" : "not accepted: " + one_line(answer.why())));
  return answer.retry();
}

void Delivery::drop(const Begun& begun, const std::string& why) {
  note(begun.work);
  kept_.clear();
  tell_("dropped: " + why);
}

bool Delivery::deliver_left(bool metered, v1::RetryWindow& retry) {
  auto begun = kept_.begun();
  if (!begun || !begun->done || metered) return false;
  std::string payload = kept_.payload();
  auto reply = static_cast<double>(payload.size() + begun->header.ByteSizeLong());
  try {
    auto answer = deliver(*begun, payload, kForever);
    Spent spent = caller_.spending().spent();
    begun->work.bytes += std::max(0.0, spent.bytes - reply);  // the work has it sent once
    begun->work.seconds += spent.seconds;
    retry = end(*begun, answer);
  } catch (const UsedUp&) {  // another day
    return false;
  } catch (const NoAnswer&) {
    throw;
  } catch (const Over& over) {
    drop(*begun, over.what());
  }
  return true;
}

void Delivery::report_left(const std::string& lease) {
  auto begun = kept_.begun();
  if (!begun || begun->lease == lease) return;
  try {
    end(*begun, deliver(*begun, "", kForever));
  } catch (const NoAnswer&) {
    throw;
  } catch (const Over& over) {
    drop(*begun, over.what());
  }
}

}  // namespace corolla
