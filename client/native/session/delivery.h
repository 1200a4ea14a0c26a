// What becomes of a session's work: it is kept, delivered, counted.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "session/channel.h"
#include "session/history.h"
#include "session/kept.h"

namespace corolla {

class Delivery {
 public:
  // `state` is the folder of the device; with `keep_updates` every reply also stays in it. `tell`
  // is told what the owner may want to know.
  Delivery(std::filesystem::path state, bool keep_updates, Caller& caller, History& history,
           std::function<void(const std::string&)> tell);

  uint64_t accepted() const { return accepted_; }  // updates, of this process

  void begin(const Begun& begun) const { kept_.begin(begun); }  // throws DiskError
  // What cannot be kept, as on a full disk, does not stop the work: the reply is still in memory.
  void keep(const Begun& begun, const std::string& payload);
  // Uploads and reports, until there is an answer. Throws Over when the round is long over, or the
  // gateway does not take it.
  v1::Acknowledgement deliver(const Begun& begun, const std::string& payload, Moment deadline);
  // The gateway's last word on a reply; returns when to ask again.
  v1::RetryWindow end(const Begun& begun, const v1::Acknowledgement& answer);
  void drop(const Begun& begun, const std::string& why);
  // A session ends without its reply being delivered, and may be gone on with.
  void interrupted(Begun begun);

  // A process that died since may have left a session. Of the lease that is gone on with, its work
  // is counted; of another one, it is reported as given up.
  void count_left(const std::string& lease);
  void report_left(const std::string& lease);
  // Whether it left a reply that is done; it is delivered, which may set `retry`. Without a
  // connection this waits on: nothing else can be done either.
  bool deliver_left(bool metered, v1::RetryWindow& retry);

 private:
  void note(Contribution work);

  std::filesystem::path version_;  // the file that names where the log led
  Kept kept_;
  Caller& caller_;
  History& history_;
  std::function<void(const std::string&)> tell_;
  uint64_t accepted_ = 0;
};

}  // namespace corolla
