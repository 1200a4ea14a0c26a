// Calls to a gateway: TLS, a token on each, a deadline on each.
#pragma once

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "base/stop.h"
#include "corolla/proto/device.grpc.pb.h"
#include "session/spending.h"

namespace corolla {

// A call took too long: ask for less.
class Slow : public Error {
 public:
  using Error::Error;
};

// Bytes of a call beside its messages, about: frames of HTTP/2 and TLS, headers, the token.
constexpr uint64_t kOverhead = 256;

struct Pauses {
  double first = 1, longest = 60;  // seconds after a call that failed
};

// Thread-safe.
class Channel {
 public:
  using Stub = v1::Phones::Stub;
  template <class Q, class R>
  using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const Q&, R*);

  // `roots`: certificates (PEM) one of which has signed the gateway's; empty: the system's. On
  // loopback no proxy of the environment is asked: to it that would be itself.
  Channel(const std::string& address, const std::string& roots, std::string token);

  // One call, without a second try. What came counts, also with a status that is none of success.
  // Throws WireError for an answer to a check-in that has too many entries.
  template <class Q, class R>
  grpc::Status once(Method<Q, R> method, const Q& request, R* response, double seconds) {
    grpc::ClientContext context;
    prepare(context, seconds);
    response->Clear();
    up_ += request.ByteSizeLong() + kOverhead;
    grpc::Status status;
    if constexpr (std::is_same_v<R, v1::CheckInResponse>) {
      status = check_in(context, request, response);
    } else {
      status = (stub_.get()->*method)(&context, request, response);
      down_ += response->ByteSizeLong();
    }
    down_ += status.error_message().size();
    return status;
  }

  uint64_t bytes_up() const { return up_; }
  uint64_t bytes_down() const { return down_; }

 private:
  void prepare(grpc::ClientContext& context, double seconds) const;
  // The one answer with a repeated field: it arrives as bytes, so that these are counted first.
  grpc::Status check_in(grpc::ClientContext& context, const v1::CheckInRequest& request,
                        v1::CheckInResponse* response);

  std::string authorization_;
  std::shared_ptr<grpc::Channel> line_;
  std::unique_ptr<Stub> stub_;
  std::atomic<uint64_t> up_{0}, down_{0};
};

// How a call is made until it has an answer: with growing pauses, for as long as it makes sense.
class Caller {
 public:
  Caller(Channel& channel, Pauses pauses, Stop& stop, std::function<void(const std::string&)> tell)
      : channel_(channel),
        pauses_(pauses),
        stop_(stop),
        tell_(std::move(tell)),
        spending_([&channel] { return channel.bytes_up() + channel.bytes_down(); }) {}

  // The answer to a call, of about `coming` bytes. Throws Over when the gateway, the deadline (or
  // the end of patience, without one) or a limit of the day has ended the session, UsageError for
  // what only the owner can mend, WireError for an answer with too many entries, Stopped; where
  // `slow`, Slow for a call that took too long.
  template <class Q, class R>
  R call(Channel::Method<Q, R> method, const Q& request, Moment deadline = kForever,
         bool slow = false, uint64_t coming = 0) {
    R response;
    double pause = pauses_.first, seconds = kSeconds;
    if (deadline == kForever && patience_) deadline = in_seconds(*patience_);
    while (true) {
      stop_.check();
      double left = spending_.ask(request.ByteSizeLong() + kOverhead + coming);
      grpc::Status status = channel_.once(method, request, &response, std::min(seconds, left));
      if (status.ok()) return response;
      failed(status, deadline, slow, pause, seconds);
    }
  }

  // A call that ends a session; it gets one try where the day is used up: a few hundred bytes then
  // free the gateway from waiting.
  template <class Q, class R>
  R last_word(Channel::Method<Q, R> method, const Q& request, Moment deadline = kForever) {
    try {
      return call(method, request, deadline);
    } catch (const UsedUp&) {
      R response;
      if (channel_.once(method, request, &response, kLeastSeconds).ok()) return response;
      throw;
    }
  }

  // From now on a call without a deadline is tried for so many seconds, not for ever.
  void be_patient_for(double seconds) { patience_ = seconds; }
  // Seconds between two check-ins, whatever a gateway says: as after two failures.
  double least_pause() const { return 2 * pauses_.first; }
  Spending& spending() { return spending_; }

  Channel& channel() { return channel_; }
  const Pauses& pauses() const { return pauses_; }
  double jitter(double low, double high);  // in between, at random

 private:
  static constexpr double kSeconds = 30;  // of one call, on a usual line

  // Waits before the next try, and makes pause and patience grow; or throws.
  void failed(const grpc::Status& status, Moment deadline, bool slow, double& pause,
              double& seconds);

  Channel& channel_;
  Pauses pauses_;
  Stop& stop_;
  std::function<void(const std::string&)> tell_;
  Spending spending_;
  std::optional<double> patience_;
};

}  // namespace corolla
