// Calls to a gateway: TLS, a token on each, a deadline on each.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "base/stop.h"
#include "corolla/proto/device.grpc.pb.h"

namespace corolla {

// Ends a session: the gateway does not want its result.
class Over : public Error {
 public:
  using Error::Error;
};

// A call took too long: ask for less.
class Slow : public Error {
 public:
  using Error::Error;
};

struct Pauses {
  double first = 1, longest = 60;  // seconds after a call that failed
};

// Thread-safe.
class Channel {
 public:
  using Stub = v1::Phones::Stub;
  template <class Q, class R>
  using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const Q&, R*);

  // `roots`: certificates (PEM) one of which has signed the gateway's; empty: the system's.
  Channel(const std::string& address, const std::string& roots, std::string token);

  // One call, without a second try.
  template <class Q, class R>
  grpc::Status once(Method<Q, R> method, const Q& request, R* response, double seconds) {
    grpc::ClientContext context;
    prepare(context, seconds);
    response->Clear();
    grpc::Status status = (stub_.get()->*method)(&context, request, response);
    up_ += request.ByteSizeLong();
    if (status.ok()) down_ += response->ByteSizeLong();
    return status;
  }

  uint64_t bytes_up() const { return up_; }
  uint64_t bytes_down() const { return down_; }

 private:
  void prepare(grpc::ClientContext& context, double seconds) const;

  std::string authorization_;
  std::unique_ptr<Stub> stub_;
  std::atomic<uint64_t> up_{0}, down_{0};
};

// How a call is made until it has an answer: with growing pauses, for as long as it makes sense.
class Caller {
 public:
  Caller(Channel& channel, Pauses pauses, Stop& stop, std::function<void(const std::string&)> tell)
      : channel_(channel), pauses_(pauses), stop_(stop), tell_(std::move(tell)) {}

  // Throws Over when the gateway or the deadline has ended the session, UsageError for what only
  // the owner can mend, Stopped; where `slow`, Slow for a call that took too long.
  template <class Q, class R>
  R call(Channel::Method<Q, R> method, const Q& request, Moment deadline = kForever,
         bool slow = false) {
    R response;
    double pause = pauses_.first, seconds = kSeconds;
    while (true) {
      stop_.check();
      grpc::Status status = channel_.once(method, request, &response, seconds);
      if (status.ok()) return response;
      failed(status, deadline, slow, pause, seconds);
    }
  }

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
};

}  // namespace corolla
